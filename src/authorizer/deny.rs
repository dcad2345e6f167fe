//! The deny list that is in force: what the file says and what the admin port was told.
//!
//! Checks read it without a lock. Whoever changes it holds a lock on the lists for a moment, and whoever touches the file
//! holds another one for as long as the disk takes, so that a slow disk keeps no denial from taking effect.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use thiserror::Error;
use tokio::task::spawn_blocking;

use super::deny_file::{DenyFile, DenyFileError, Edit, Sight};
use crate::domain::deny_list::{DenyEntry, DenyList, LineDefect};
use crate::domain::key::PrefixLength;
use crate::telemetry::metrics::Metrics;

/// How often the file is looked at. Without a change that is one `stat`.
const LOOK_AT_FILE: Duration = Duration::from_secs(1);

/// What the disk may take before somebody who denies a key is told that it is denied.
const FILE_LIMIT: Duration = Duration::from_secs(5);

/// Most entries of one change that are logged one by one.
const MAX_LOGGED: usize = 100;

/// The deny list of this process. One, shared by checks and the admin port.
pub struct DenyControl {
    in_force: ArcSwap<DenyList>,
    lists: Mutex<Lists>,
    file: Option<WatchedFile>,
    prefix_length: PrefixLength,
    metrics: Metrics,
}

/// What is in force, by where it comes from.
#[derive(Debug, Default)]
struct Lists {
    from_file: DenyList,
    from_admin: DenyList,
    /// Why `from_file` is not what the file says now.
    trouble: Option<String>,
}

struct WatchedFile {
    file: DenyFile,
    /// The last version that was read, good or bad. Its lock is the one on the file.
    known: Mutex<Option<Sight>>,
}

/// Where an entry comes from; of two places the one that lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// `--deny-file`
    File,
    /// `POST /deny`, and in no file.
    Admin,
}

impl Source {
    /// The word in answers and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Admin => "admin",
        }
    }
}

/// How long a denial holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Persistence {
    /// Until it is removed: it is in the file.
    File,
    /// Until it is removed or this process ends.
    Memory(String),
}

/// Everything that is in force, for an operator.
#[derive(Debug)]
pub struct Shown {
    /// In order.
    pub entries: Vec<(DenyEntry, Source)>,
    /// Why the file is not in force as it is now; its last good version is.
    pub trouble: Option<String>,
}

/// `--deny-file` can't be used at the start.
#[derive(Debug, Error)]
#[error("--deny-file {}: {reason}", path.display())]
pub struct OpenError {
    path: PathBuf,
    reason: DenyFileError,
}

/// A change that was not made.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// No room.
    #[error("the deny list is full; remove entries that need not be denied any more")]
    Full,
    /// There is nothing to remove.
    #[error("there is no such entry in the deny list")]
    NotListed,
    /// The file goes on saying it.
    #[error("the entry is in {} and stays in force, because the file could not be changed: {reason}", path.display())]
    InFile {
        /// `--deny-file`
        path: PathBuf,
        /// What is wrong with the file.
        reason: String,
    },
}

impl DenyControl {
    /// Reads the file, if there is one.
    pub fn open(
        file: Option<PathBuf>,
        prefix_length: PrefixLength,
        metrics: Metrics,
    ) -> Result<Arc<Self>, OpenError> {
        let mut lists = Lists::default();
        let file = file.map(|path| DenyFile::new(path, prefix_length));
        if let Some(file) = &file {
            let contents =
                file.read().map_err(|reason| OpenError { path: file.path().to_owned(), reason })?;
            tracing::info!(path = %file.path().display(), entries = contents.list.len(), "deny list read");
            lists.from_file = contents.list;
        }
        // No version counts as known yet: the first look reads the file again, settled.
        let file = file.map(|file| WatchedFile { file, known: Mutex::new(None) });
        let control =
            Self { in_force: ArcSwap::default(), lists: Mutex::default(), file, prefix_length, metrics };
        control.publish(&lists);
        *control.lists() = lists;
        Ok(Arc::new(control))
    }

    /// What is in force at this moment.
    pub fn in_force(&self) -> Guard<Arc<DenyList>> {
        self.in_force.load()
    }

    /// Every key with this prefix, as an entry.
    pub fn prefix(&self, text: &str) -> Result<DenyEntry, LineDefect> {
        DenyEntry::prefix(text, self.prefix_length)
    }

    /// `--deny-file`
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|watched| watched.file.path())
    }

    /// Everything that is in force.
    pub fn shown(&self) -> Shown {
        let lists = self.lists();
        let source = |entry: &DenyEntry| {
            if lists.from_file.contains(entry) { Source::File } else { Source::Admin }
        };
        let entries = lists.in_force().entries();
        let entries = entries.into_iter().map(|entry| {
            let source = source(&entry);
            (entry, source)
        });
        Shown { entries: entries.collect(), trouble: lists.trouble.clone() }
    }

    /// Denies, at once; and writes it into the file, if that can be done.
    pub async fn add(self: &Arc<Self>, entry: DenyEntry) -> Result<Persistence, ChangeError> {
        {
            let mut lists = self.lists();
            let is_new = !lists.in_force().contains(&entry);
            if !lists.from_admin.insert(entry.clone()) {
                return Err(ChangeError::Full);
            }
            self.publish(&lists);
            if is_new {
                log_change(&entry, Source::Admin, true);
            }
        }
        if self.file.is_none() {
            return Ok(Persistence::Memory("there is no --deny-file".to_owned()));
        }
        let control = Arc::clone(self);
        // Goes on if whoever asked has gone away.
        let writing = spawn_blocking(move || control.write(&entry));
        let written = tokio::time::timeout(FILE_LIMIT, writing).await;
        Ok(match written {
            Ok(Ok(persistence)) => persistence,
            Ok(Err(_)) | Err(_) => Persistence::Memory("--deny-file could not be written in time".to_owned()),
        })
    }

    /// Denies no longer: where the file has it too, only once it is out of there.
    pub async fn remove(self: &Arc<Self>, entry: DenyEntry) -> Result<(), ChangeError> {
        let control = Arc::clone(self);
        let removing = spawn_blocking(move || control.remove_now(&entry));
        match tokio::time::timeout(FILE_LIMIT, removing).await {
            Ok(Ok(removed)) => removed,
            Ok(Err(_)) | Err(_) => Err(ChangeError::InFile {
                path: self.path().unwrap_or(Path::new("--deny-file")).to_owned(),
                reason: "it could not be read and written in time".to_owned(),
            }),
        }
    }

    /// Reads the file whenever it changes, until the task is aborted.
    pub async fn watch(self: Arc<Self>) {
        while self.file.is_some() {
            tokio::time::sleep(LOOK_AT_FILE).await;
            let control = Arc::clone(&self);
            let _ = spawn_blocking(move || control.look()).await;
        }
    }

    /// Reads the file now, if it has changed. Why it is not in force as it is, where it is not.
    pub async fn reload(self: &Arc<Self>) -> Option<String> {
        let control = Arc::clone(self);
        let looking = spawn_blocking(move || control.look());
        match tokio::time::timeout(FILE_LIMIT, looking).await {
            Ok(_) => self.lists().trouble.clone(),
            Err(_) => Some("it could not be read in time".to_owned()),
        }
    }

    fn write(&self, entry: &DenyEntry) -> Persistence {
        let Some(WatchedFile { file, known }) = &self.file else {
            return Persistence::Memory("there is no --deny-file".to_owned());
        };
        let mut known = locked(known);
        match file.edit(known.as_ref(), Edit::Add(entry)) {
            Ok(contents) => {
                *known = Some(Ok(contents.version));
                let mut lists = self.lists();
                lists.from_admin.remove(entry);
                self.adopt(&mut lists, contents.list);
                Persistence::File
            }
            Err(error) => {
                tracing::warn!(path = %file.path().display(), %error, "denied in memory only, until this process ends");
                Persistence::Memory(format!("{}: {error}", file.path().display()))
            }
        }
    }

    fn remove_now(&self, entry: &DenyEntry) -> Result<(), ChangeError> {
        // Held to the end, so that no look puts back what is being removed.
        let mut known = self.file.as_ref().map(|watched| (&watched.file, locked(&watched.known)));
        if let Some((file, known)) = &mut known {
            self.look_at(file, known);
        }
        if !self.lists().in_force().contains(entry) {
            return Err(ChangeError::NotListed);
        }
        if let Some((file, known)) = &mut known {
            match file.edit(known.as_ref(), Edit::Remove(entry)) {
                Ok(contents) => {
                    **known = Some(Ok(contents.version));
                    let mut lists = self.lists();
                    lists.from_admin.remove(entry);
                    self.adopt(&mut lists, contents.list);
                    return Ok(());
                }
                Err(error) if self.lists().from_file.contains(entry) => {
                    let path = file.path().to_owned();
                    return Err(ChangeError::InFile { path, reason: error.to_string() });
                }
                // It is none of the file's entries, so the file need not be well.
                Err(_) => {}
            }
        }
        let mut lists = self.lists();
        lists.from_admin.remove(entry);
        self.publish(&lists);
        log_change(entry, Source::Admin, false);
        Ok(())
    }

    fn look(&self) {
        if let Some(WatchedFile { file, known }) = &self.file {
            self.look_at(file, &mut locked(known));
        }
    }

    /// Reads the file if it is not the known version.
    fn look_at(&self, file: &DenyFile, known: &mut Option<Sight>) {
        if known.as_ref() == Some(&file.look()) {
            return;
        }
        let (seen, contents) = file.read_settled(known.as_ref());
        let mut lists = self.lists();
        match contents {
            Ok(contents) => {
                *known = Some(seen);
                self.adopt(&mut lists, contents.list);
            }
            Err(error) => {
                *known = error.lasts().then_some(seen);
                let trouble = error.to_string();
                if lists.trouble.as_ref() != Some(&trouble) {
                    lists.trouble = Some(trouble.clone());
                    self.publish(&lists);
                    tracing::warn!(
                        path = %file.path().display(),
                        error = trouble,
                        "the deny file can't be used; what it said last stays in force"
                    );
                }
            }
        }
    }

    /// Puts what the file says now in force, and says what has changed by it.
    fn adopt(&self, lists: &mut Lists, list: DenyList) {
        let before = self.in_force();
        lists.from_file = list;
        if lists.trouble.take().is_some() {
            tracing::info!("the deny file is in force again");
        }
        self.publish(lists);
        let after = self.in_force();
        for (is_denied, old, new) in [(true, &before, &after), (false, &after, &before)] {
            let changed: Vec<_> = new.entries().into_iter().filter(|entry| !old.contains(entry)).collect();
            for entry in changed.iter().take(MAX_LOGGED) {
                log_change(entry, Source::File, is_denied);
            }
            if changed.len() > MAX_LOGGED {
                let more = changed.len() - MAX_LOGGED;
                tracing::info!(more, is_denied, "more entries of the deny file have changed");
            }
        }
    }

    fn publish(&self, lists: &Lists) {
        let list = lists.in_force();
        self.metrics.deny_list_entries.set(i64::try_from(list.len()).unwrap_or(i64::MAX));
        self.metrics.deny_list_reload_failed.set(i64::from(lists.trouble.is_some()));
        self.in_force.store(Arc::new(list));
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        locked(&self.lists)
    }
}

impl Lists {
    fn in_force(&self) -> DenyList {
        self.from_file.union(&self.from_admin)
    }
}

/// A panic elsewhere leaves whole values behind: each is replaced in one step.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn log_change(entry: &DenyEntry, source: Source, is_denied: bool) {
    let message = if is_denied { "denied from now on" } else { "denied no longer" };
    match entry {
        DenyEntry::Key(id) => tracing::info!(key_id = id.get(), source = source.as_str(), "{message}"),
        DenyEntry::Prefix(prefix) => {
            tracing::info!(prefix = prefix.as_str(), source = source.as_str(), "{message}");
        }
    }
}
