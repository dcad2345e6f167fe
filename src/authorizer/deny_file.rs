//! The file behind the deny list: read whole, written whole, never half.
//!
//! It is somebody else's file: an editor's, a script's, or a `ConfigMap` that is swapped by a symbolic link. So it is read
//! only once it has stopped changing (a file that is just being written would lift every denial for a moment), and
//! replaced only by a finished copy that keeps comments, other lines and mode.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use thiserror::Error;

use crate::domain::deny_list::{DenyEntry, DenyList, DenyListError, MAX_BYTES, with_line, without_lines};
use crate::domain::key::PrefixLength;

/// How long a file must have stayed as it is to count as written. Longer than the clock tick that times of files have.
const SETTLE: Duration = Duration::from_millis(100);

/// How often a file that goes on changing is looked at: two seconds in all.
const SETTLE_ATTEMPTS: usize = 20;

/// How often a change is made again because somebody else changed the file meanwhile.
const EDIT_ATTEMPTS: usize = 3;

/// A deny list in a file.
#[derive(Debug)]
pub(super) struct DenyFile {
    path: PathBuf,
    length: PrefixLength,
}

/// What a look at the file showed, without reading it: which version of it is there, or why none is.
pub(super) type Sight = Result<Version, String>;

/// Differs where the contents may differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// A file that was read.
#[derive(Debug)]
pub(super) struct Contents {
    text: String,
    /// What it says.
    pub(super) list: DenyList,
    /// Which version this is.
    pub(super) version: Version,
}

/// An entry comes or goes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Edit<'e> {
    /// Deny.
    Add(&'e DenyEntry),
    /// No longer.
    Remove(&'e DenyEntry),
}

/// Why the file can't be used.
#[derive(Debug, Error)]
pub(super) enum DenyFileError {
    /// It is not there, or no file.
    #[error("{0}; create it (an empty file denies nobody) or set --deny-file off")]
    Absent(String),
    /// It could not be read.
    #[error("it can't be read: {0}")]
    Unreadable(io::Error),
    /// It was read and is no deny list.
    #[error("{0}")]
    Defective(#[from] DenyListError),
    /// It changes again and again.
    #[error("it was being written all the time")]
    Unsettled,
    /// It could not be replaced.
    #[error("it can't be written: {0}")]
    Unwritable(io::Error),
}

impl DenyFileError {
    /// Whether only another version of the file can end this.
    pub(super) fn lasts(&self) -> bool {
        matches!(self, Self::Absent(_) | Self::Defective(_))
    }
}

impl DenyFile {
    pub(super) fn new(path: PathBuf, length: PrefixLength) -> Self {
        Self { path, length }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Follows symbolic links.
    pub(super) fn look(&self) -> Sight {
        let metadata = fs::metadata(&self.path).map_err(|error| format!("it can't be found: {error}"))?;
        // A pipe would be waited for, and a device never ends.
        if metadata.is_file() {
            Ok(Version::of(&metadata))
        } else {
            Err("it is not a regular file".to_owned())
        }
    }

    /// Reads it as it is now.
    pub(super) fn read(&self) -> Result<Contents, DenyFileError> {
        self.read_version(self.look().map_err(DenyFileError::Absent)?)
    }

    fn read_version(&self, version: Version) -> Result<Contents, DenyFileError> {
        let most = u64::try_from(MAX_BYTES + 1).unwrap_or(u64::MAX);
        let mut bytes = Vec::new();
        let file = File::open(&self.path).map_err(DenyFileError::Unreadable)?;
        file.take(most).read_to_end(&mut bytes).map_err(DenyFileError::Unreadable)?;
        let list = DenyList::parse(&bytes, self.length)?;
        // A list is text; what is none has been refused by now.
        let text = String::from_utf8(bytes)
            .map_err(|error| DenyFileError::Unreadable(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        Ok(Contents { text, list, version })
    }

    /// Reads it once it has stopped changing; a version that is known has. Waits in this thread.
    pub(super) fn read_settled(&self, known: Option<&Sight>) -> (Sight, Result<Contents, DenyFileError>) {
        self.read_rested(known, || sleep(SETTLE))
    }

    fn read_rested(
        &self,
        known: Option<&Sight>,
        mut rest: impl FnMut(),
    ) -> (Sight, Result<Contents, DenyFileError>) {
        let mut seen = self.look();
        let mut has_settled = known == Some(&seen);
        for _ in 0..SETTLE_ATTEMPTS {
            if !has_settled {
                rest();
            }
            has_settled = false;
            let again = self.look();
            if again == seen {
                let contents = match again {
                    Ok(version) => self.read_version(version),
                    Err(reason) => Err(DenyFileError::Absent(reason)),
                };
                if self.look() == seen {
                    return (seen, contents);
                }
            }
            seen = self.look();
        }
        (seen, Err(DenyFileError::Unsettled))
    }

    /// Adds or removes an entry, so that all of it happens or nothing. The contents afterwards.
    pub(super) fn edit(&self, known: Option<&Sight>, edit: Edit<'_>) -> Result<Contents, DenyFileError> {
        for _ in 0..EDIT_ATTEMPTS {
            let contents = self.read_settled(known).1?;
            let text = match edit {
                Edit::Add(entry) if !contents.list.contains(entry) => with_line(&contents.text, entry),
                Edit::Remove(entry) if contents.list.contains(entry) => {
                    without_lines(&contents.text, entry, self.length)
                }
                Edit::Add(_) | Edit::Remove(_) => return Ok(contents),
            };
            let list = DenyList::parse(text.as_bytes(), self.length)?;
            if let Some(version) =
                self.replace(&contents.version, &text).map_err(DenyFileError::Unwritable)?
            {
                return Ok(Contents { text, list, version });
            }
        }
        Err(DenyFileError::Unsettled)
    }

    /// Puts a finished copy in the file's place; `None` where it is not the expected version any more.
    fn replace(&self, expected: &Version, text: &str) -> io::Result<Option<Version>> {
        // Behind symbolic links, so that they stay.
        let target = fs::canonicalize(&self.path)?;
        let metadata = fs::metadata(&target)?;
        // Who may write into the folder could replace it all the same, and root could anyway.
        if metadata.permissions().readonly() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "its mode lets nobody write"));
        }
        OpenOptions::new().write(true).open(&target)?;
        let folder = target.parent().unwrap_or(Path::new("/"));
        let copy = NewFile::create(folder)?;
        let mut file = &copy.file;
        let (user, group) = (metadata.uid(), metadata.gid());
        let own = file.metadata()?;
        if (own.uid(), own.gid()) != (user, group) {
            // Only root may give files away. Where we can't, the file is ours from now on.
            let _ = fchown(file, Some(user), Some(group));
        }
        file.set_permissions(metadata.permissions())?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        if self.look().as_ref() != Ok(expected) {
            return Ok(None);
        }
        fs::rename(&copy.path, &target)?;
        // The name is on the disk once its folder is.
        File::open(folder)?.sync_all()?;
        Ok(Some(Version::of(&copy.file.metadata()?)))
    }
}

impl Version {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// A file of our own in that folder, gone at the end unless it was renamed.
struct NewFile {
    path: PathBuf,
    file: File,
}

impl NewFile {
    fn create(folder: &Path) -> io::Result<Self> {
        // In containers that share the folder, process ids are alike.
        let random = getrandom::u64()?;
        let path = folder.join(format!(".keyward-deny-{random:016x}"));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Self { path, file })
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::domain::record::KeyId;

    fn file_in(folder: &Path, text: &str) -> DenyFile {
        let path = folder.join("deny");
        fs::write(&path, text).unwrap();
        DenyFile::new(path, PrefixLength::DEFAULT)
    }

    fn key(id: i64) -> DenyEntry {
        DenyEntry::Key(KeyId::new(id))
    }

    fn names(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn an_edit_keeps_comments_mode_and_links_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let real = tempfile::tempdir().unwrap();
        let target = real.path().join("list");
        fs::write(&target, "# leaked\nkey-id 7 # ada").unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o664)).unwrap();
        symlink(&target, folder.path().join("deny")).unwrap();
        let file = DenyFile::new(folder.path().join("deny"), PrefixLength::DEFAULT);

        let added = file.edit(None, Edit::Add(&key(9))).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "# leaked\nkey-id 7 # ada\nkey-id 9\n");
        assert_eq!(file.look(), Ok(added.version.clone()));
        // What is there already is not written again.
        let again = file.edit(Some(&Ok(added.version.clone())), Edit::Add(&key(7))).unwrap();
        assert_eq!(again.version, added.version);
        let removed = file.edit(None, Edit::Remove(&key(7))).unwrap();
        assert!(!removed.list.contains(&key(7)) && removed.list.contains(&key(9)));
        assert_eq!(fs::read_to_string(&target).unwrap(), "# leaked\nkey-id 9\n");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o7777, 0o664);
        assert!(fs::symlink_metadata(file.path()).unwrap().is_symlink());
        assert_eq!((names(folder.path()), names(real.path())), (1, 1));
    }

    #[test]
    fn what_may_not_be_written_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let file = file_in(folder.path(), "key-id 7\n");
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o444)).unwrap();
        let error = file.edit(None, Edit::Add(&key(9))).unwrap_err();
        assert!(matches!(error, DenyFileError::Unwritable(_)), "{error}");
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "key-id 7\n");
        assert_eq!(names(folder.path()), 1);
    }

    /// To write one entry into the place of a file that went away would lift all the others.
    #[test]
    fn a_file_that_is_missing_or_bad_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = file_in(folder.path(), "key-id seven\n");
        let error = file.edit(None, Edit::Add(&key(9))).unwrap_err();
        assert!(matches!(error, DenyFileError::Defective(_)), "{error}");
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "key-id seven\n");
        fs::remove_file(file.path()).unwrap();
        let error = file.edit(None, Edit::Add(&key(9))).unwrap_err();
        assert!(matches!(error, DenyFileError::Absent(_)), "{error}");
        assert_eq!(names(folder.path()), 0);
        let not_a_file = DenyFile::new(folder.path().to_owned(), PrefixLength::DEFAULT);
        assert!(not_a_file.read().unwrap_err().to_string().contains("not a regular file"));
        let endless = DenyFile::new("/dev/zero".into(), PrefixLength::DEFAULT);
        assert!(matches!(endless.read(), Err(DenyFileError::Absent(_))));
    }

    #[test]
    fn a_version_that_somebody_else_wrote_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let file = file_in(folder.path(), "key-id 7\n");
        let old = file.read().unwrap();
        fs::write(file.path(), "key-id 7\nkey-id 8\n").unwrap();
        assert!(file.replace(&old.version, "key-id 9\n").unwrap().is_none());
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "key-id 7\nkey-id 8\n");
        assert_eq!(names(folder.path()), 1);
    }

    /// While a writer has cut the file short and not filled it again, it is not read.
    #[test]
    fn a_file_is_read_once_it_has_stopped_changing() {
        let folder = tempfile::tempdir().unwrap();
        let file = file_in(folder.path(), "key-id 7\n");
        let mut steps = ["", "key-id 7\nkey", "key-id 7\nkey-id 8\n"].into_iter();
        let (seen, contents) = file.read_rested(None, || {
            if let Some(step) = steps.next() {
                fs::write(file.path(), step).unwrap();
            }
        });
        let contents = contents.unwrap();
        assert_eq!((contents.list.len(), seen), (2, Ok(contents.version)));

        let mut size = 0;
        let restless = file.read_rested(None, || {
            size += 1;
            fs::write(file.path(), "#".repeat(size)).unwrap();
        });
        assert!(matches!(restless.1, Err(DenyFileError::Unsettled)));
    }
}
