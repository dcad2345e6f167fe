//! What can go wrong between us and the store, by what the caller can do about it.
//!
//! "The store said no" (not found, conflict, refused) and "the store could not be asked" are different answers; the
//! second must never be taken for the first ([`StoreError::is_unavailable`]).

use std::error::Error as StdError;

use thiserror::Error;
use tokio_postgres::error::SqlState;

/// Why the store gave no answer, or a bad one.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Down, unreachable, refusing connections, or broken in the middle.
    #[error("the store can't be reached")]
    Unavailable(#[source] Box<dyn StdError + Send + Sync>),
    /// No answer within the time given to a query, waiting for a connection included.
    #[error("the store did not answer in time")]
    Timeout,
    /// There is a database, but not ours.
    #[error("the store has no tables api_keys and users; run `keyward migrate`")]
    MissingTables,
    /// The server is a standby, whose answers may be old.
    #[error("the Postgres server is a standby, not the primary")]
    NotPrimary,
    /// Over [`super::MAX_CANDIDATES`] keys share one prefix.
    #[error("more than 64 keys share this prefix")]
    TooManyCandidates,
    /// What was named does not exist.
    #[error("no such {0}")]
    NotFound(&'static str),
    /// What was to be created exists.
    #[error("{0}")]
    Conflict(&'static str),
    /// The store does not do this for us: no right to, or a value that it does not take.
    #[error("the store refused: {0}")]
    Refused(String),
    /// The tables are not as the contract says.
    #[error("the store's tables do not fit: {0}")]
    Schema(String),
}

impl StoreError {
    /// Whether the store could not be asked, as opposed to having answered no.
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::Unavailable(_)
            | Self::Timeout
            | Self::MissingTables
            | Self::NotPrimary
            | Self::TooManyCandidates
            | Self::Schema(_) => true,
            Self::NotFound(_) | Self::Conflict(_) | Self::Refused(_) => false,
        }
    }

    pub(super) fn unavailable(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Unavailable(source.into())
    }
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(report) = error.as_db_error() else {
            return Self::unavailable(error);
        };
        let code = report.code();
        if *code == SqlState::QUERY_CANCELED || *code == SqlState::LOCK_NOT_AVAILABLE {
            return Self::Timeout;
        }
        if *code == SqlState::UNIQUE_VIOLATION {
            let named = [report.constraint(), report.detail()].into_iter().flatten().collect::<String>();
            return conflict(&named);
        }
        if *code == SqlState::FOREIGN_KEY_VIOLATION {
            return Self::NotFound("user or role");
        }
        if *code == SqlState::UNDEFINED_TABLE {
            return Self::MissingTables;
        }
        // The message names columns and tables; a row's values are in the detail, which is left out.
        let message = || report.message().to_owned();
        match code.code() {
            "42501" => Self::Refused(format!("{}; grant it to this role, or use one that has it", message())),
            "25006" => Self::Refused(message()),
            other if other.starts_with("22") || other.starts_with("23") => Self::Refused(message()),
            other if other.starts_with("42") || other.starts_with("0A") => Self::Schema(message()),
            _ => Self::unavailable(error),
        }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        let rusqlite::Error::SqliteFailure(failure, message) = &error else {
            return Self::Schema(error.to_string());
        };
        let message = message.clone().unwrap_or_else(|| failure.to_string());
        match failure.code {
            ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::OperationInterrupted => {
                Self::Timeout
            }
            ErrorCode::ConstraintViolation if message.starts_with("UNIQUE") => conflict(&message),
            ErrorCode::ConstraintViolation if message.starts_with("FOREIGN KEY") => {
                Self::NotFound("user or role")
            }
            ErrorCode::ConstraintViolation
            | ErrorCode::ReadOnly
            | ErrorCode::PermissionDenied
            | ErrorCode::AuthorizationForStatementDenied
            | ErrorCode::TypeMismatch => Self::Refused(message),
            _ if message.starts_with("no such table") => Self::MissingTables,
            _ if message.starts_with("no such column") => Self::Schema(message),
            _ => Self::unavailable(error),
        }
    }
}

/// What exists already, from the name of the constraint or the column.
fn conflict(named: &str) -> StoreError {
    StoreError::Conflict(if named.contains("username") {
        "a user with this username exists"
    } else if named.contains("email") {
        "a user with this email exists"
    } else if named.contains("key_hash") {
        "a key with this hash exists"
    } else {
        "it exists already"
    })
}
