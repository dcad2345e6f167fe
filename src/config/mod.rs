//! Settings: one table, four layers (flag, environment, file, default), every mistake reported at once.
//!
//! [`load`] is the only way to [`Settings`], so that nothing behind it checks a setting again. This part knows no
//! clap and no store; the command line hands it the flags that it found.

mod file;
mod load;
pub mod nearest;
mod schema;
mod settings;
mod values;

#[cfg(test)]
mod pages;

pub use load::{Effective, Given, Loaded, Mistakes, Origin, load};
pub use schema::schema;
pub use settings::{Secrecy, Setting, Settings, TABLE};
pub use values::{SecretUrl, Shown};
