//! Keeps the process' memory to itself: callers' keys pass through it, and whoever reads a core file or attaches a debugger
//! reads them.

use std::panic::{PanicHookInfo, set_hook};

use rustix::process::{Resource, Rlimit, setrlimit};

/// No core files, no debugger of the same user, and no values in what a panic says. What the kernel refuses is logged and
/// does not keep the sidecar from its work.
pub(super) fn keep() {
    set_hook(Box::new(|panic| {
        tracing::error!(place = place(panic), "a defect: this part of the work was given up");
    }));
    if let Err(error) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        tracing::warn!(%error, "core files can't be turned off");
    }
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
    {
        tracing::warn!(%error, "debuggers of the same user can't be kept out");
    }
}

/// The place in the source and nothing else: a panic's message may hold the bytes that it was about.
fn place(panic: &PanicHookInfo<'_>) -> String {
    panic.location().map_or_else(|| "unknown".to_owned(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_panic_says_where_and_not_about_what() {
        let (send, said) = mpsc::channel();
        let before = std::panic::take_hook();
        set_hook(Box::new(move |panic| {
            let _ = send.send(place(panic));
        }));
        let panicked = std::thread::spawn(|| panic!("about canary-secret")).join();
        set_hook(before);
        assert!(panicked.is_err());
        let said: Vec<String> = said.iter().collect();
        let own = said.iter().find(|line| line.contains("own_memory.rs"));
        assert!(own.is_some(), "{said:?}");
        assert!(!said.concat().contains("canary-secret"), "{said:?}");
    }
}
