//! The four layers: a flag beats the environment, which beats the file, which beats the default.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::file::{self, Entry, place};
use super::nearest::nearest;
use super::settings::{Secrecy, Setting, Settings, TABLE, Texts};
use super::values::{HIDDEN, Reading};
use crate::server::options::{CredentialSource, IdentityHeader};

/// Names the file, where no flag does.
const FILE_VARIABLE: &str = "KEYWARD_CONFIG";

/// What the names of our variables begin with.
const PREFIX: &str = "KEYWARD_";

/// What was given to this process.
#[derive(Debug, Default)]
pub struct Given {
    /// `--config`
    pub file: Option<PathBuf>,
    /// The flags that were given, by their names in the table.
    pub flags: BTreeMap<&'static str, String>,
    /// The environment.
    pub environment: Vec<(OsString, OsString)>,
}

/// The settings, and where each of them came from.
#[derive(Debug)]
pub struct Loaded {
    /// Ready to be used.
    pub settings: Settings,
    /// Variables that begin like ours and resemble none of them: somebody else's, but worth a word.
    pub ignored: Vec<String>,
    /// The settings file, where it holds a password and others than its owner may read it.
    pub open_file: Option<PathBuf>,
    /// The layer of each setting, by its flag.
    origins: BTreeMap<&'static str, Origin>,
}

/// One setting as it is in force.
#[derive(Debug)]
pub struct Effective {
    /// Which.
    pub setting: &'static Setting,
    /// The value as text, secrets hidden.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
}

/// Which layer a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody gave one.
    Default,
    /// `FILE:LINE`
    File(String),
    /// The variable.
    Environment(String),
    /// The flag with its dashes.
    Flag(String),
}

impl Origin {
    /// The layer's word.
    pub const fn layer(&self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::File(_) => "file",
            Self::Environment(_) => "environment",
            Self::Flag(_) => "flag",
        }
    }

    /// Where in that layer.
    pub fn place(&self) -> Option<&str> {
        match self {
            Self::Default => None,
            Self::File(place) | Self::Environment(place) | Self::Flag(place) => Some(place),
        }
    }
}

impl Loaded {
    /// Every setting as it is in force, in the table's order.
    pub fn effective(&self) -> Vec<Effective> {
        let with_origin = |(setting, value): (&'static Setting, String)| {
            let origin = self.origins.get(setting.flag).cloned().unwrap_or(Origin::Default);
            Effective { setting, value, origin }
        };
        self.settings.shown().into_iter().map(with_origin).collect()
    }

    fn has_password_in_file(&self) -> bool {
        self.effective().iter().any(|Effective { origin, value, .. }| {
            matches!(origin, Origin::File(_)) && value.contains(HIDDEN)
        })
    }
}

impl Settings {
    /// The settings that have another value there. Passwords are compared too, though they are never shown.
    pub fn differing(&self, other: &Self) -> Vec<&'static Setting> {
        let secrets = |settings: &Self| {
            let redis = settings.redis.as_ref().map(|url| url.expose_secret().to_owned());
            BTreeMap::from([("store", Some(settings.store.expose_secret().to_owned())), ("redis", redis)])
        };
        let (own, others) = (secrets(self), secrets(other));
        let pairs = self.shown().into_iter().zip(other.shown());
        let differing = pairs.filter(|((setting, value), (_, other))| {
            value != other || own.get(setting.flag) != others.get(setting.flag)
        });
        differing.map(|((setting, _), _)| setting).collect()
    }
}

fn may_be_read_by_others(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o044 != 0)
}

/// Everything that is wrong, one line each; never empty.
#[derive(Debug, PartialEq, Eq)]
pub struct Mistakes(Vec<String>);

impl Mistakes {
    /// The lines.
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Mistakes {}

/// Reads all layers. Every mistake of every layer is reported, also one that another layer would overrule.
pub fn load(given: Given) -> Result<Loaded, Mistakes> {
    let mut layers = Layers::default();
    let environment = layers.read_environment(given.environment);
    let file = given.file.or_else(|| environment.get(FILE_VARIABLE).map(PathBuf::from));
    if let Some(path) = &file {
        layers.read_file(path);
    }
    for setting in TABLE {
        if let Some(text) = environment.get(&setting.variable()) {
            layers.put(setting, Origin::Environment(setting.variable()), text.clone());
        }
        if let Some(text) = given.flags.get(setting.flag) {
            layers.put(setting, Origin::Flag(format!("--{}", setting.flag)), text.clone());
        }
    }
    let settings = Settings::read(&mut layers);
    if let Some(settings) = &settings {
        layers.check_together(settings);
    }
    match settings {
        Some(settings) if layers.mistakes.is_empty() => {
            let ignored = std::mem::take(&mut layers.ignored);
            let mut loaded = Loaded { settings, ignored, open_file: None, origins: layers.origins() };
            loaded.open_file =
                file.filter(|path| loaded.has_password_in_file() && may_be_read_by_others(path));
            Ok(loaded)
        }
        _ => Err(Mistakes(layers.mistakes)),
    }
}

#[derive(Default)]
struct Layers {
    /// From the weakest layer to the strongest, per flag.
    texts: BTreeMap<&'static str, Vec<(Origin, String)>>,
    mistakes: Vec<String>,
    ignored: Vec<String>,
}

impl Layers {
    fn put(&mut self, setting: &'static Setting, origin: Origin, text: String) {
        self.texts.entry(setting.flag).or_default().push((origin, text));
    }

    fn origins(self) -> BTreeMap<&'static str, Origin> {
        let strongest = |(flag, mut texts): (_, Vec<(Origin, String)>)| Some((flag, texts.pop()?.0));
        self.texts.into_iter().filter_map(strongest).collect()
    }

    fn read_file(&mut self, path: &Path) {
        match file::read(path) {
            Ok(mut entries) => {
                for setting in TABLE {
                    if let Some(Entry { text, line }) = entries.remove(setting.flag) {
                        let place = place(&path.display().to_string(), line);
                        self.put(setting, Origin::File(format!("{place} {}", setting.file_path())), text);
                    }
                }
            }
            Err(mistakes) => self.mistakes.extend(mistakes),
        }
    }

    /// The variables of ours. A misspelt one is a mistake, because it was meant to do something; one that resembles none
    /// is ignored, because scripts around us choose names like ours.
    fn read_environment(&mut self, variables: Vec<(OsString, OsString)>) -> BTreeMap<String, String> {
        let mut known: Vec<String> = TABLE.iter().map(|setting| setting.variable()).collect();
        known.push(FILE_VARIABLE.to_owned());
        let mut read = BTreeMap::new();
        for (name, value) in variables {
            let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else {
                continue;
            };
            let Some(value) = value.to_str() else {
                self.mistakes.push(format!("{name}: is not UTF-8 text"));
                continue;
            };
            if known.iter().any(|known| known == name) {
                read.insert(name.to_owned(), value.to_owned());
            } else if !is_service_link(name, value) {
                // Without what they all share, which would make any two of them alike.
                let own = |name: &'_ str| name.trim_start_matches(PREFIX).to_owned();
                let settings: Vec<String> = known.iter().map(|known| own(known)).collect();
                match nearest(&own(name), settings.iter().map(String::as_str)) {
                    Some(near) => self
                        .mistakes
                        .push(format!("unknown environment variable {name}; did you mean {PREFIX}{near}?")),
                    None => self.ignored.push(name.to_owned()),
                }
            }
        }
        read
    }

    /// The rules that concern several settings.
    fn check_together(&mut self, settings: &Settings) {
        if settings.redis.is_some() && settings.cache_secret_file.is_none() {
            let place = self.place_of("redis");
            self.mistakes.push(format!(
                "{place}: expected --cache-secret-file too, because what goes to Redis is sealed with it"
            ));
        }
        self.check_tls(settings);
        let prefix = &settings.response_header_prefix;
        for source in &settings.credential_sources {
            let CredentialSource::Header(name) = source else { continue };
            let own = name.strip_prefix(prefix.as_str());
            if own.is_some_and(|own| IdentityHeader::ALL.iter().any(|header| header.name() == own)) {
                self.mistakes.push(format!(
                    "--credential-sources: expected another header than {name}, which the upstream gets from here"
                ));
            }
        }
    }
}

impl Layers {
    fn check_tls(&mut self, settings: &Settings) {
        let Settings { grpc_tls_cert, grpc_tls_key, grpc_tls_client_ca, grpc_tls_client_sans, .. } = settings;
        let Settings { http_tls_cert, http_tls_key, http_tls_client_ca, http_tls_client_sans, .. } = settings;
        let doors = [
            (
                ["grpc-tls-cert", "grpc-tls-key", "grpc-tls-client-ca", "grpc-tls-client-sans"],
                [grpc_tls_cert, grpc_tls_key, grpc_tls_client_ca].map(Option::is_some),
                !grpc_tls_client_sans.is_empty(),
            ),
            (
                ["http-tls-cert", "http-tls-key", "http-tls-client-ca", "http-tls-client-sans"],
                [http_tls_cert, http_tls_key, http_tls_client_ca].map(Option::is_some),
                !http_tls_client_sans.is_empty(),
            ),
        ];
        for ([of_cert, of_key, of_ca, of_sans], [cert, key, ca], sans) in doors {
            let rules = [
                (of_cert, cert && !key, format!("--{of_key} too, the private key of this certificate")),
                (of_key, key && !cert, format!("--{of_cert} too, the certificate of this key")),
                (
                    of_ca,
                    ca && !cert,
                    format!("--{of_cert} and --{of_key} too: without TLS no client shows a certificate"),
                ),
                (
                    of_sans,
                    sans && !ca,
                    format!("--{of_ca} too: only an authority's word makes a name worth something"),
                ),
            ];
            for (flag, is_broken, expected) in rules {
                if is_broken {
                    let place = self.place_of(flag);
                    self.mistakes.push(format!("{place}: expected {expected}"));
                }
            }
        }
    }

    /// Where the text that holds for a setting was given.
    fn place_of(&self, flag: &str) -> String {
        let strongest = self.texts.get(flag).and_then(|texts| texts.last());
        strongest.and_then(|(origin, _)| origin.place()).map_or_else(|| format!("--{flag}"), str::to_owned)
    }
}

impl Texts for Layers {
    fn read<T>(&mut self, setting: &'static Setting, reader: fn(&str) -> Reading<T>) -> Option<T> {
        let Some(texts) = self.texts.get(setting.flag) else {
            let default = reader(setting.default);
            if let Err(expected) = &default {
                // The tests read every default, so this is never seen outside of them.
                self.mistakes.push(format!("default of {}: expected {expected}", setting.flag));
            }
            return default.ok();
        };
        let mut strongest = None;
        for (origin, text) in texts {
            strongest = match reader(text) {
                Ok(value) => Some(value),
                Err(expected) => {
                    let place = origin.place().unwrap_or(setting.flag);
                    let found = match setting.secrecy {
                        Secrecy::Plain => format!("{text:?} is not valid"),
                        Secrecy::Secret => "the value is not valid".to_owned(),
                    };
                    self.mistakes.push(format!("{place}: {found}, expected {expected}"));
                    None
                }
            };
        }
        strongest
    }
}

/// Kubernetes sets variables for every service of the namespace: beside a service named `keyward` or `keyward-admin`
/// there are `KEYWARD_SERVICE_HOST`, `KEYWARD_PORT_9191_TCP_ADDR` and so on, which nobody meant for us.
fn is_service_link(name: &str, value: &str) -> bool {
    let is_url = ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    let has_protocol = ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| name.contains(protocol));
    name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || (name.ends_with("_PORT") && is_url)
        || (name.contains("_PORT_") && has_protocol)
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
