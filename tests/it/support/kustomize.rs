//! What `k8s/` renders to, as JSON, and ways to look around in it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::program::Ended;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn tool(name: &str) -> PathBuf {
    let path = root().join(".tools/manifests").join(name);
    assert!(path.exists(), "there is no {}; run scripts/install-tools.sh manifests", path.display());
    path
}

pub(crate) fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

pub(crate) fn documents(yaml: &str) -> Vec<Value> {
    yaml.split("\n---\n").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
}

pub(crate) fn rendered(overlay: &str) -> Vec<Value> {
    rendered_from(&root().join("k8s"), overlay)
}

pub(crate) fn rendered_from(k8s: &Path, overlay: &str) -> Vec<Value> {
    let folder = k8s.join("overlays").join(overlay);
    let ended: Ended = Command::new(tool("kubectl")).arg("kustomize").arg(folder).output().unwrap().into();
    assert_eq!(ended.code, 0, "{overlay}: {}", ended.stderr);
    assert_eq!(ended.stderr, "", "{overlay}");
    documents(&ended.stdout)
}

pub(crate) fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("no {pointer} in {object}"))
}

pub(crate) fn items<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    object.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

pub(crate) fn name(object: &Value) -> String {
    format!("{} {}", text(object, "/kind"), text(object, "/metadata/name"))
}

pub(crate) fn find<'a>(objects: &'a [Value], kind: &str, named: &str) -> &'a Value {
    let is_it = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == named;
    objects.iter().find(is_it).unwrap_or_else(|| panic!("no {kind} {named}"))
}

pub(crate) fn is_custom(object: &Value) -> bool {
    let group = text(object, "/apiVersion").split('/').next().unwrap_or_default();
    group.contains('.') && !group.ends_with("k8s.io") || group == "gateway.networking.k8s.io"
}

/// The pods of all workloads, with the workload's name.
pub(crate) fn pods(objects: &[Value]) -> Vec<(String, &Value)> {
    let template = |object| Value::pointer(object, "/spec/template").map(|template| (name(object), template));
    objects.iter().filter_map(template).collect()
}

/// All containers of a pod, sidecars too.
pub(crate) fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    items(pod, "/spec/initContainers").chain(items(pod, "/spec/containers"))
}
