//! One process at a time: a lock that the operating system takes back when its holder dies.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// A lock that is held until it is dropped.
pub struct FileLock(File);

impl Drop for FileLock {
    /// Unlocks by word: closing the file would not, while a child process that was started at this
    /// moment still has it open.
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

impl FileLock {
    /// Locks the file at `path` and leaves this process's id in it for whoever comes second. The file
    /// itself stays: removing it could take the lock of another.
    ///
    /// # Errors
    /// Where another process has it: it "(pid 123) `holds`", as the message says.
    pub fn acquire(path: &Path, holds: &str) -> Result<FileLock> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| format!("could not open the lock {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("another process{} {holds}", holder(&mut file)),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("could not lock {}", path.display()));
            }
        }
        // A pid that cannot be written costs a detail of a message, and not the lock.
        let _ = file
            .set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(FileLock(file))
    }
}

/// ` (pid 123)`, or nothing where the holder has not said.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let pid = file
        .read_to_string(&mut text)
        .ok()
        .and_then(|_| text.trim().parse::<u32>().ok());
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}
