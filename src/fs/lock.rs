//! [`FileLock`]: an exclusive lock between processes. If a process ends, the operating system releases its locks.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// A held lock; dropping it releases the lock.
pub struct FileLock(File);

impl Drop for FileLock {
    /// Unlocks explicitly: closing the file does not release the lock while a child process has it open.
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

impl FileLock {
    /// Locks the file at `path` and writes the id of this process into it, for the error message of a second process.
    /// `activity` completes that message, as in "is using this run folder". The file is never removed: otherwise a
    /// second process could lock a new file of the same name.
    ///
    /// # Errors
    /// If another process has the lock: "another process (pid 123) {activity}"; if the file cannot be opened or locked.
    pub fn acquire(path: &Path, activity: &str) -> Result<FileLock> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| format!("could not open the lock file {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("another process{} {activity}", holder_pid(&mut file))
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("could not lock {}", path.display()));
            }
        }
        // The pid is used only in a message, so a write error is ignored.
        let _ = file
            .set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(FileLock(file))
    }
}

/// Returns ` (pid 123)`, or an empty text if the file contains no pid.
fn holder_pid(file: &mut File) -> String {
    let mut text = String::new();
    let pid = file
        .read_to_string(&mut text)
        .ok()
        .and_then(|_| text.trim().parse::<u32>().ok());
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}
