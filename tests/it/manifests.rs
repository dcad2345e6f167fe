//! What `k8s/` renders to: every object fits its schema, every pod is confined, no secret is written down, names that
//! refer to each other agree, and the binary takes the settings. No cluster is asked: there is none.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::program::{Ended, keyward};
use crate::support::envoy;
use crate::support::kustomize::{
    containers, documents, find, is_custom, items, name, pods, read, rendered, rendered_from, root, text,
    tool,
};

const OVERLAYS: [&str; 4] = ["sidecar", "shared", "istio", "envoy-gateway"];

/// What finishing may take after the drain delay: answers, the canary, writes, 5 s each (`src/cli/serve.rs`).
const FINISH_SECONDS: u64 = 15;

/// Kubernetes' own, in the form that refuses unknown fields.
fn schema(object: &Value) -> Value {
    let version = text(object, "/apiVersion").replace(".networking", "").replace('/', "-");
    let (group, version) = version.rsplit_once('-').unwrap_or(("", &version));
    let group = group.split('.').next().unwrap_or_default();
    let group = if group.is_empty() { String::new() } else { format!("-{group}") };
    let file = format!("{}{group}-{version}.json", text(object, "/kind").to_lowercase());
    let folder = tool("kubernetes");
    let load = |file: &str| -> Value {
        let text =
            std::fs::read_to_string(folder.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        serde_json::from_str(&text.replace("/api/_definitions.json#/", "#/")).unwrap()
    };
    let mut schema = load(&file);
    schema["$defs"] = load("_definitions.json")["$defs"].take();
    schema
}

fn mistakes(schema: &Value, object: &Value) -> Vec<String> {
    let validator = jsonschema::validator_for(schema).unwrap();
    validator.iter_errors(object).map(|error| format!("{} at {}", error, error.instance_path())).collect()
}

#[test]
fn every_overlay_renders_and_every_object_of_kubernetes_fits_its_schema() {
    for overlay in OVERLAYS {
        let objects = rendered(overlay);
        assert!(objects.len() > 8, "{overlay} has {} objects", objects.len());
        for object in objects.iter().filter(|object| !is_custom(object)) {
            assert_eq!(mistakes(&schema(object), object), [""; 0], "{overlay}: {}", name(object));
        }
    }
    for document in documents(&read("k8s/base/secret.example.yaml")) {
        assert_eq!(mistakes(&schema(&document), &document), [""; 0]);
    }
}

/// Istio's, the Gateway API's and the Prometheus operator's, by the types that npm carries.
#[test]
fn custom_resources_fit_the_types_of_their_projects() {
    let mut objects: Vec<Value> = OVERLAYS.iter().flat_map(|overlay| rendered(overlay)).collect();
    objects.retain(|object| {
        is_custom(object) && !text(object, "/apiVersion").starts_with("gateway.envoyproxy.io")
    });
    assert!(objects.len() >= 8, "{}", objects.len());
    let mut node = Command::new("node")
        .args([root().join("scripts/crd_check.mjs"), root().join(".tools/manifests")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run node");
    node.stdin.take().unwrap().write_all(json!(objects).to_string().as_bytes()).unwrap();
    let ended: Ended = node.wait_with_output().unwrap().into();
    assert_eq!((ended.code, &*ended.stdout), (0, ""), "{}", ended.stderr);
}

/// No package carries Envoy Gateway's types: these are the fields that are used here, as its reference has them.
#[test]
fn objects_of_envoy_gateway_use_known_fields() {
    let target = json!({"type": "object", "additionalProperties": false, "required": ["group", "kind", "name"],
        "properties": {"group": {"const": "gateway.networking.k8s.io"}, "kind": {"enum": ["Gateway", "HTTPRoute"]},
            "name": {"type": "string"}}});
    let closed = |properties: Value| json!({"type": "object", "additionalProperties": false, "properties": properties});
    let duration = json!({"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"});
    let backend = json!({"type": "object", "additionalProperties": false, "required": ["name", "port"],
        "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}, "port": {"type": "integer"}}});
    let triggers = ["connect-failure", "refused-stream", "reset", "unavailable"];
    let retry = closed(json!({
        "numRetries": {"type": "integer", "minimum": 0},
        "retryOn": closed(json!({"triggers": {"type": "array", "items": {"enum": triggers}}})),
        "perRetry": closed(json!({"backOff": closed(json!({"baseInterval": duration, "maxInterval": duration}))})),
    }));
    let ext_auth = closed(json!({
        "grpc": closed(json!({"backendRefs": {"type": "array", "minItems": 1, "items": backend},
            "backendSettings": closed(json!({"retry": retry}))})),
        "timeout": duration,
        "failOpen": {"const": false},
        "statusOnError": {"const": 503},
        "bodyToExtAuth": closed(json!({"maxRequestBytes": {"type": "integer", "minimum": 1}})),
    }));
    let targets = json!({"type": "array", "minItems": 1, "items": target});
    let specs = BTreeMap::from([
        ("SecurityPolicy", closed(json!({"targetRefs": targets, "extAuth": ext_auth}))),
        (
            "ClientTrafficPolicy",
            closed(json!({
                "targetRefs": targets,
                "path": closed(json!({"escapedSlashesAction": {"const": "RejectRequest"}, "disableMergeSlashes": {"const": false}})),
                "headers": closed(json!({"withUnderscoresAction": {"const": "RejectRequest"}})),
                "connection": closed(json!({"bufferLimit": {"type": "string", "pattern": "^[0-9]+Mi$"}})),
            })),
        ),
    ]);
    let objects = rendered("envoy-gateway");
    let of_gateway =
        objects.iter().filter(|object| text(object, "/apiVersion") == "gateway.envoyproxy.io/v1alpha1");
    let mut seen = 0;
    for object in of_gateway {
        seen += 1;
        assert_eq!(mistakes(&specs[text(object, "/kind")], &object["spec"]), [""; 0], "{}", name(object));
    }
    assert_eq!(seen, 2);
    let policy = find(&objects, "SecurityPolicy", "keyward");
    let backend = policy.pointer("/spec/extAuth/grpc/backendRefs/0").unwrap();
    let service = find(&objects, "Service", text(backend, "/name"));
    assert_eq!(service["metadata"]["namespace"], backend["namespace"]);
    assert_eq!(service["spec"]["ports"][0]["port"], backend["port"]);
    let grant = find(&objects, "ReferenceGrant", "keyward");
    assert_eq!(grant["metadata"]["namespace"], backend["namespace"]);
    assert_eq!(grant["spec"]["from"][0]["namespace"], policy["metadata"]["namespace"]);
}

#[test]
fn every_pod_is_confined_and_says_what_it_needs() {
    for overlay in OVERLAYS {
        for (workload, pod) in pods(&rendered(overlay)) {
            let of = format!("{overlay}: {workload}");
            let spec = &pod["spec"];
            assert_eq!(spec["automountServiceAccountToken"], false, "{of}");
            assert_eq!(spec["serviceAccountName"], "keyward", "{of}");
            assert_eq!(spec["securityContext"]["runAsNonRoot"], true, "{of}");
            assert!(spec["securityContext"]["runAsUser"].as_u64().unwrap() >= 10_000, "{of}");
            assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{of}");
            for container in containers(pod) {
                let of = format!("{of}, {}", container["name"]);
                let context = &container["securityContext"];
                assert_eq!(context["readOnlyRootFilesystem"], true, "{of}");
                assert_eq!(context["allowPrivilegeEscalation"], false, "{of}");
                assert_eq!(context["capabilities"]["drop"], json!(["ALL"]), "{of}");
                for need in ["/requests/cpu", "/requests/memory", "/limits/memory"] {
                    assert!(container["resources"].pointer(need).is_some(), "{of} has no {need}");
                }
                let image = text(container, "/image");
                let tag = image.rsplit('/').next().unwrap().split_once(':').map(|(_, tag)| tag);
                assert!(tag.is_some_and(|tag| tag.contains('.') && tag != "latest"), "{of}: {image}");
            }
        }
    }
}

#[test]
fn secrets_are_named_and_never_written_down() {
    let examples = documents(&read("k8s/base/secret.example.yaml"));
    let exists = |reference: &Value, key: &str| {
        let secret = find(&examples, "Secret", text(reference, "/name"));
        assert!(secret["stringData"][key].is_string(), "{reference} is not in secret.example.yaml");
    };
    for overlay in OVERLAYS {
        let objects = rendered(overlay);
        for object in &objects {
            assert_ne!(object["kind"], "Secret", "{overlay}");
            let text = object.to_string();
            assert!(!text.contains("change-me"), "{overlay}: {}", name(object));
            // user:password@
            let has_password = text.split("://").skip(1).any(|rest| {
                let authority = rest.split(['/', '"', ' ']).next().unwrap_or_default();
                authority.split_once('@').is_some_and(|(user, _)| user.contains(':'))
            });
            assert!(!has_password, "{overlay}: {}", name(object));
        }
        for (workload, pod) in pods(&objects) {
            for env in containers(pod).flat_map(|container| items(container, "/env")) {
                if ["KEYWARD_STORE", "KEYWARD_REDIS"].contains(&text(env, "/name")) {
                    let reference = env.pointer("/valueFrom/secretKeyRef");
                    let reference = reference.unwrap_or_else(|| panic!("{overlay}: {workload}: {env}"));
                    exists(reference, text(reference, "/key"));
                }
            }
            for volume in items(pod, "/spec/volumes").filter_map(|volume| volume.get("secret")) {
                let mode = volume["defaultMode"].as_u64().unwrap();
                assert_eq!(mode & 0o337, 0, "{overlay}: {workload}: {mode:o} lets others read it");
                let named = json!({"name": volume["secretName"]});
                items(volume, "/items").for_each(|item| exists(&named, text(item, "/key")));
            }
        }
    }
}

/// A container's environment, with something in the place of each secret.
fn environment(objects: &[Value], container: &Value, secret_file: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for source in items(container, "/envFrom") {
        let map = find(objects, "ConfigMap", text(source, "/configMapRef/name"));
        for (key, value) in map["data"].as_object().unwrap() {
            found.insert(key.clone(), value.as_str().unwrap().to_owned());
        }
    }
    for env in items(container, "/env") {
        let value = match text(env, "/name") {
            "KEYWARD_STORE" => "postgres://keyward:x@postgres:5432/platform?sslmode=verify-full",
            "KEYWARD_REDIS" => "rediss://:x@redis:6379",
            _ => text(env, "/value"),
        };
        found.insert(text(env, "/name").to_owned(), value.to_owned());
    }
    if let Some(file) = found.get_mut("KEYWARD_CACHE_SECRET_FILE") {
        let mounts: Vec<&str> =
            items(container, "/volumeMounts").map(|mount| text(mount, "/mountPath")).collect();
        assert!(mounts.contains(&"/etc/keyward") && file == "/etc/keyward/cache-secret", "{file}");
        *file = secret_file.display().to_string();
    }
    found
}

#[test]
fn the_binary_takes_every_setting_argument_and_probe_and_has_time_to_end() {
    let folder = tempdir().unwrap();
    let secret_file = folder.path().join("cache-secret");
    std::fs::write(&secret_file, "x".repeat(64)).unwrap();
    let mut checked = 0;
    for overlay in OVERLAYS {
        let objects = rendered(overlay);
        for (workload, pod) in pods(&objects) {
            let ours = |container: &&Value| text(container, "/image").contains("/keyward:");
            for container in containers(pod).filter(ours) {
                checked += 1;
                let of = format!("{overlay}: {workload}");
                let environment = environment(&objects, container, &secret_file);
                let mut check = keyward(folder.path(), &["config", "check"]);
                let ended: Ended = check.envs(&environment).output().unwrap().into();
                // Says so where a variable is no setting.
                assert_eq!((ended.code, &*ended.stderr), (0, "the settings are valid\n"), "{of}");
                let args: Vec<&str> = items(container, "/args").map(|arg| arg.as_str().unwrap()).collect();
                let probes = ["startupProbe", "readinessProbe", "livenessProbe"];
                let commands = probes.iter().filter_map(|probe| container.get(probe)).map(|probe| {
                    let command: Vec<&str> =
                        items(probe, "/exec/command").map(|word| word.as_str().unwrap()).collect();
                    assert!(read("Dockerfile").contains(&format!("\"{}\"", command[0])), "{command:?}");
                    // Longer than `keyward health` waits, so that what it says is what the kubelet hears.
                    assert!(probe["timeoutSeconds"].as_u64() >= Some(1), "{of}");
                    command[1..].to_vec()
                });
                for command in commands.chain([args.clone()]) {
                    let ended: Ended = keyward(folder.path(), &[&command[..], &["--help"]].concat())
                        .output()
                        .unwrap()
                        .into();
                    assert_eq!(ended.code, 0, "{of}: {command:?}: {}", ended.stderr);
                }
                if args == ["serve"] {
                    assert!(probes.iter().all(|probe| container.get(probe).is_some()), "{of}");
                    let drain =
                        humantime::parse_duration(&environment["KEYWARD_DRAIN_DELAY"]).unwrap().as_secs();
                    let stops = containers(pod).filter_map(|container| {
                        container.pointer("/lifecycle/preStop/sleep/seconds")?.as_u64()
                    });
                    let grace = pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
                    assert!(
                        grace >= stops.sum::<u64>() + drain + FINISH_SECONDS,
                        "{of}: {grace} s are too short"
                    );
                }
            }
        }
    }
    assert_eq!(checked, 8, "a server and a migration in each overlay");
}

#[test]
fn what_names_something_else_names_something_that_is_there() {
    for overlay in OVERLAYS {
        let objects = rendered(overlay);
        let pods = pods(&objects);
        for object in &objects {
            let of = format!("{overlay}: {}", name(object));
            let selector = match text(object, "/kind") {
                "Service" => object.pointer("/spec/selector"),
                "PodDisruptionBudget" | "Deployment" => object.pointer("/spec/selector/matchLabels"),
                "NetworkPolicy" => object.pointer("/spec/podSelector/matchLabels"),
                "HorizontalPodAutoscaler" => {
                    find(&objects, "Deployment", text(object, "/spec/scaleTargetRef/name"));
                    continue;
                }
                _ => continue,
            };
            let wanted =
                selector.and_then(Value::as_object).unwrap_or_else(|| panic!("{of} selects nothing"));
            let labels = |pod: &Value| pod.pointer("/metadata/labels").cloned().unwrap_or_default();
            let fits =
                |pod: &&(String, &Value)| wanted.iter().all(|(key, value)| labels(pod.1)[key] == *value);
            let (_, pod) = pods.iter().find(fits).unwrap_or_else(|| panic!("{of} selects no pod"));
            let ports: Vec<&Value> =
                containers(pod).flat_map(|container| items(container, "/ports")).collect();
            for port in items(object, "/spec/ports").map(|port| &port["targetPort"]) {
                let is_there = |known: &Value| known["name"] == *port || known["containerPort"] == *port;
                assert!(ports.iter().any(|known| is_there(known)), "{of}: no container has port {port}");
            }
        }
        for (workload, pod) in &pods {
            find(&objects, "ServiceAccount", text(pod, "/spec/serviceAccountName"));
            let maps = items(pod, "/spec/volumes").filter_map(|volume| volume.pointer("/configMap/name"));
            for map in maps {
                let named = map.as_str().unwrap();
                assert_ne!(find(&objects, "ConfigMap", named)["data"], Value::Null, "{workload}");
            }
        }
        let monitor = find(&objects, "ServiceMonitor", "keyward");
        let service = find(&objects, "Service", "keyward-admin");
        for (label, value) in monitor["spec"]["selector"]["matchLabels"].as_object().unwrap() {
            assert_eq!(service["metadata"]["labels"][label], *value, "{overlay}");
        }
        assert_eq!(monitor["spec"]["endpoints"][0]["port"], service["spec"]["ports"][0]["name"]);
        // The admin port never without a policy that guards it.
        assert_eq!(
            find(&objects, "NetworkPolicy", "keyward-admin")["spec"]["podSelector"]["matchLabels"],
            service["spec"]["selector"]
        );
    }
}

/// The component that opens the admin port can be left out, and then the port is not open.
#[test]
fn without_the_monitoring_component_the_admin_port_stays_on_loopback() {
    let folder = tempdir().unwrap();
    let copied = Command::new("cp").arg("-r").arg(root().join("k8s")).arg(folder.path()).status().unwrap();
    assert!(copied.success());
    let k8s = folder.path().join("k8s");
    for overlay in ["sidecar", "shared"] {
        let open = find(&rendered(overlay), "NetworkPolicy", "keyward-admin").clone();
        assert_eq!(open["spec"]["ingress"][0]["ports"][0]["port"], 9193);
        let file = k8s.join("overlays").join(overlay).join("kustomization.yaml");
        let text = std::fs::read_to_string(&file).unwrap();
        let without = text.replace("components:\n  - ../../components/monitoring\n", "");
        assert_ne!(text, without);
        std::fs::write(&file, without).unwrap();
        let objects = rendered_from(&k8s, overlay);
        assert!(
            objects.iter().all(|object| !object.to_string().contains("KEYWARD_ADMIN_LISTEN")),
            "{overlay}"
        );
        assert!(objects.iter().all(|object| object["kind"] != "ServiceMonitor"), "{overlay}");
    }
}

/// Istio's provider fails closed, soon, and at a Service that exists; the policy names it.
#[test]
fn istio_asks_keyward_within_a_time_limit_and_is_named_right() {
    let mesh = documents(&read("k8s/overlays/istio/meshconfig.yaml")).remove(0);
    let provider = mesh.pointer("/spec/meshConfig/extensionProviders/0").unwrap();
    let grpc = &provider["envoyExtAuthzGrpc"];
    let known = ["service", "port", "timeout", "failOpen", "statusOnError", "includeRequestBodyInCheck"];
    let fields: Vec<&String> = grpc.as_object().unwrap().keys().collect();
    assert!(fields.iter().all(|field| known.contains(&field.as_str())), "{fields:?}");
    assert_eq!((&grpc["failOpen"], &grpc["statusOnError"]), (&json!(false), &json!("503")));
    let seconds: f64 = text(grpc, "/timeout").trim_end_matches('s').parse().unwrap();
    assert!((0.2..=2.0).contains(&seconds), "{seconds}");
    let body = &grpc["includeRequestBodyInCheck"];
    assert_eq!(
        body,
        &json!({"maxRequestBytes": 4_194_304, "allowPartialMessage": true, "packAsBytes": true})
    );
    let objects = rendered("istio");
    let policy = find(&objects, "AuthorizationPolicy", "keyward");
    assert_eq!(policy["spec"]["provider"]["name"], provider["name"]);
    assert_eq!((&policy["spec"]["action"], &policy["spec"]["rules"]), (&json!("CUSTOM"), &json!([{}])));
    let service = find(&objects, "Service", "keyward");
    let host = format!(
        "{}.{}.svc.cluster.local",
        text(service, "/metadata/name"),
        text(service, "/metadata/namespace")
    );
    assert_eq!(text(grpc, "/service"), host);
    assert_eq!(service["spec"]["ports"][0]["port"], grpc["port"]);
}

/// Envoy itself takes what `EnvoyFilter` merges into its configuration; whether Istio merges it there is not tried here.
#[test]
fn envoy_takes_what_istio_is_told_to_merge() {
    fn merge(into: &mut Value, what: &Value) {
        match (into.as_object_mut(), what.as_object()) {
            (Some(into), Some(what)) => {
                what.iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
            }
            _ => what.clone_into(into),
        }
    }
    let objects = rendered("istio");
    let filter = find(&objects, "EnvoyFilter", "keyward");
    let patches: Vec<&Value> =
        items(filter, "/spec/configPatches").map(|patch| &patch["patch"]["value"]).collect();
    let [ext_authz, manager, listener] = patches[..] else { panic!("{patches:?}") };
    let mut config: Value = serde_saphyr::from_str(&read("envoy/no-body.yaml")).unwrap();
    merge(&mut config["static_resources"]["listeners"][0], listener);
    let hcm = config.pointer_mut("/static_resources/listeners/0/filter_chains/0/filters/0").unwrap();
    merge(hcm, manager);
    let filters = hcm.pointer_mut("/typed_config/http_filters").unwrap().as_array_mut().unwrap();
    let at = filters.iter().position(|filter| filter["name"] == ext_authz["name"]).unwrap();
    // What Istio writes by itself, as far as Keyward's provider asks for it.
    filters[at]["typed_config"] = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
        "grpc_service": {"envoy_grpc": {"cluster_name": "keyward"}, "timeout": "0.5s"},
        "status_on_error": {"code": "ServiceUnavailable"},
    });
    merge(&mut filters[at], ext_authz);
    let folder = tempdir().unwrap();
    let file = folder.path().join("envoy.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let output = envoy::validate(&file);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_dockerfile_is_clean_and_its_image_is_not_root() {
    let ended: Ended = Command::new(tool("hadolint"))
        .args(["--failure-threshold", "info", "--no-color", "Dockerfile"])
        .current_dir(root())
        .output()
        .unwrap()
        .into();
    assert_eq!((ended.code, &*ended.stdout), (0, ""), "{}", ended.stderr);
    let dockerfile = read("Dockerfile");
    let last = dockerfile.rsplit("\nFROM ").next().unwrap();
    for needed in
        ["USER 65532:65532", "HEALTHCHECK ", "\"health\"", "org.opencontainers.image.", "ENTRYPOINT ["]
    {
        assert!(last.contains(needed), "the last stage has no {needed}");
    }
    assert!(dockerfile.contains("--locked"));
}
