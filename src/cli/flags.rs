//! The settings as flags: every command takes those that it uses, and `--config`.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};

use super::output::note;
use crate::config::{Given, Loaded, Mistakes, Setting, TABLE, load};

/// Which settings a command has flags for. The others still come from the environment and the file.
pub(super) trait Selection {
    /// Whether this one.
    fn includes(setting: &Setting) -> bool;
}

/// For `serve` and `config`.
#[derive(Debug, Clone)]
pub(super) struct AllSettings;

/// For commands that read and write the store.
#[derive(Debug, Clone)]
pub(super) struct StoreSettings;

/// For commands that make keys.
#[derive(Debug, Clone)]
pub(super) struct NewKeySettings;

/// For commands that talk to the running sidecar.
#[derive(Debug, Clone)]
pub(super) struct AdminSettings;

/// For `check`: what a decision depends on, and where the running sidecar is.
#[derive(Debug, Clone)]
pub(super) struct CheckSettings;

impl Selection for AllSettings {
    fn includes(_: &Setting) -> bool {
        true
    }
}

impl Selection for StoreSettings {
    fn includes(setting: &Setting) -> bool {
        setting.flag == "store"
    }
}

impl Selection for NewKeySettings {
    fn includes(setting: &Setting) -> bool {
        ["store", "key-prefix-length", "new-key-prefix"].contains(&setting.flag)
    }
}

impl Selection for AdminSettings {
    fn includes(setting: &Setting) -> bool {
        setting.flag == "admin-listen"
    }
}

impl Selection for CheckSettings {
    fn includes(setting: &Setting) -> bool {
        [
            "admin-listen",
            "store",
            "key-prefix-length",
            "deny-file",
            "shadow",
            "model-paths",
            "scope-paths",
            "response-header-prefix",
            "response-headers",
        ]
        .contains(&setting.flag)
    }
}

/// The flags of one command line.
#[derive(Debug, Clone)]
pub(super) struct SettingFlags<S> {
    file: Option<PathBuf>,
    flags: BTreeMap<&'static str, String>,
    selection: PhantomData<S>,
}

impl<S: Selection> SettingFlags<S> {
    /// Reads all layers, with this process's environment.
    pub(super) fn load(self) -> Result<Loaded, Mistakes> {
        let loaded = self.reload()?;
        for name in &loaded.ignored {
            note(&format!("note: the environment variable {name} is no setting of keyward and is ignored"));
        }
        if let Some(path) = &loaded.open_file {
            note(&format!(
                "note: {} holds a password and can be read by group or others; set its mode to 0600",
                path.display()
            ));
        }
        Ok(loaded)
    }

    /// The same anew, without the notes: what can have changed is the file.
    pub(super) fn reload(&self) -> Result<Loaded, Mistakes> {
        let environment = std::env::vars_os().collect();
        load(Given { file: self.file.clone(), flags: self.flags.clone(), environment })
    }

    fn selected() -> impl Iterator<Item = &'static Setting> {
        TABLE.iter().copied().filter(|setting| S::includes(setting))
    }
}

const CONFIG: &str = "config";

fn argument(setting: &'static Setting) -> Arg {
    let help = setting.help();
    let first =
        help.split_once(". ").map_or(help.as_str(), |(first, _)| first).trim_end_matches('.').to_owned();
    let names = format!("[default: {}] [environment: {}]", setting.default, setting.variable());
    let argument = Arg::new(setting.flag)
        .long(setting.flag)
        .value_name(setting.form)
        .help_heading("Settings")
        .help(format!("{first} [default: {}]", setting.default))
        .long_help(format!("{help}\n\n{names}"));
    if is_repeatable(setting) {
        return argument.action(ArgAction::Append);
    }
    // A switch may stand alone.
    if setting.form == "on|off" { argument.num_args(0..=1).default_missing_value("on") } else { argument }
}

/// Addresses are added one by one; other lists are better seen whole.
fn is_repeatable(setting: &Setting) -> bool {
    setting.flag == "grpc-listen"
}

impl<S: Selection> Args for SettingFlags<S> {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new(CONFIG)
            .long(CONFIG)
            .value_name("FILE")
            .help_heading("Settings")
            .value_parser(value_parser!(PathBuf))
            .help("YAML file with settings [environment: KEYWARD_CONFIG]");
        command.arg(file).args(Self::selected().map(argument))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<S: Selection> FromArgMatches for SettingFlags<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |setting: &'static Setting| {
            let texts: Vec<&str> = matches.get_many::<String>(setting.flag)?.map(String::as_str).collect();
            Some((setting.flag, texts.join(",")))
        };
        Ok(Self {
            file: matches.get_one::<PathBuf>(CONFIG).cloned(),
            flags: Self::selected().filter_map(given).collect(),
            selection: PhantomData,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
