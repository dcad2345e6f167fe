//! A child process that can't outlive its test.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A running child; killed when dropped. If the test is failing by then, the end of its log is printed.
pub(crate) struct Process {
    child: Child,
    name: &'static str,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts `program` with its output in files in `folder`, and without any `KEYWARD_` setting of the person who runs
    /// the tests. `setpriv` has the kernel kill it when the thread that started it ends, so call this from the test's
    /// own thread.
    pub(crate) fn start(name: &'static str, program: &Path, folder: &Path, args: &[String]) -> Self {
        let stdout = folder.join(format!("{name}.out"));
        let stderr = folder.join(format!("{name}.log"));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(args);
        without_settings(&mut command);
        let child = command
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).expect("create the output file"))
            .stderr(File::create(&stderr).expect("create the log file"))
            .spawn()
            .expect("start a child with setpriv (Debian: util-linux)");
        Self { child, name, stdout, stderr }
    }

    /// Everything it has written to stdout.
    pub(crate) fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// Everything it has written to stderr.
    pub(crate) fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("ask for a child's state")
    }

    /// Its process id; `setpriv` became the program, so it is the program's.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a child of ours can be signalled");
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::TERM);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.stderr();
            let lines: Vec<_> = log.lines().collect();
            let end = lines.get(lines.len().saturating_sub(40)..).unwrap_or_default().join("\n");
            // Not `eprintln!`: it would panic again where stderr is closed.
            let _ = writeln!(std::io::stderr(), "--- end of {}'s log ---\n{end}\n---", self.name);
        }
    }
}

/// Removes the settings that a person's environment may hold.
pub(crate) fn without_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("KEYWARD_") {
            command.env_remove(name);
        }
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).expect("read a child's output")).into_owned()
}
