//! The run folder of the demo. The demo overwrites only files that it wrote itself. There is one exception: the folders
//! of the first versions have no `demo.json`, so a file with unknown content is copied to `NAME.previous` before it is
//! replaced.
//!
//! `demo.json` holds the hash of every content that the demo has written to each file. It is updated before the file,
//! so that a demo that was killed at any moment recognises its own files and resumes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::exit::Exit;
use crate::fs;

const MANIFEST: &str = "demo.json";
const VERSION: u32 = 1;

/// An opened run folder of the demo.
pub(super) struct DemoFolder {
    dir: PathBuf,
    manifest: Manifest,
}

/// Flags of the demo that determine its data and its training. A run folder keeps them, because a training cannot
/// resume with other ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Sizes {
    pub prompts: usize,
    pub heldout: usize,
    pub steps: u64,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    version: u32,
    /// `None` in the manifests of versions that did not record the sizes.
    #[serde(default)]
    sizes: Option<Sizes>,
    /// Hashes of all contents that the demo has written, by file.
    files: BTreeMap<String, BTreeSet<String>>,
}

impl DemoFolder {
    /// Opens `dir`, into which the demo will write the files `names`. `shipped` are the files, with their contents,
    /// that every version of the demo has written.
    ///
    /// # Errors
    /// [`Exit::Usage`] if the manifest is invalid or has other sizes, or a file of `names` has content that the demo
    /// did not write. Without a manifest: if the folder is neither empty nor the folder of an earlier version, which is
    /// recognised by its shipped files.
    pub(super) fn open<'a>(
        dir: &Path,
        names: impl Iterator<Item = &'a str>,
        shipped: &[(&str, &[u8])],
        sizes: Sizes,
    ) -> Result<Self> {
        let path = dir.join(MANIFEST);
        if !path.exists() {
            let is_shipped = |(name, bytes): &(&str, &[u8])| {
                std::fs::read(dir.join(name)).is_ok_and(|content| content == *bytes)
            };
            let mut files = BTreeMap::new();
            if shipped.iter().all(is_shipped) {
                // The first versions wrote no manifest. `write` keeps a copy of what it replaces.
                files = shipped_hashes(shipped);
            } else {
                check_is_empty(dir)?;
            }
            return Ok(Self {
                dir: dir.to_owned(),
                manifest: Manifest {
                    version: VERSION,
                    sizes: Some(sizes),
                    files,
                },
            });
        }
        let text = fs::read_to_string(&path)?;
        let manifest: Manifest = serde_json::from_str(&text).map_err(|error| {
            Exit::Usage(format!(
                "{} is not a manifest of the demo: {error}; choose another folder with --dir",
                path.display()
            ))
        })?;
        let earlier = manifest.sizes.unwrap_or(sizes);
        if earlier != sizes {
            bail!(Exit::Usage(format!(
                "the demo in {} was started with --prompts {} --heldout {} --steps {}: resume it with these flags, or \
                 choose another folder with --dir",
                dir.display(),
                earlier.prompts,
                earlier.heldout,
                earlier.steps
            )));
        }
        let mut folder = Self {
            dir: dir.to_owned(),
            manifest,
        };
        for name in names {
            folder.check_is_own(name)?;
        }
        if folder.manifest.sizes.replace(sizes).is_none() {
            folder.save_manifest()?;
        }
        Ok(folder)
    }

    /// Writes a file, unless it already has this content. If the manifest does not contain the hash of the file's
    /// present content, the file is copied to `NAME.previous` before it is replaced.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(super) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        let hashes = self.manifest.files.entry(name.to_owned()).or_default();
        let existing = std::fs::read(&path).ok();
        if let Some(existing) = &existing
            && existing != bytes
            && !hashes.contains(&hash(existing))
        {
            let previous = self.dir.join(format!("{name}.previous"));
            fs::write_atomic(&previous, existing)?;
            tracing::warn!(
                "{} is replaced: its previous content is in {}",
                path.display(),
                previous.display()
            );
        }
        let is_new = hashes.insert(hash(bytes));
        // The manifest first: a folder without it is refused.
        fs::create_dir_all(&self.dir)?;
        if is_new {
            self.save_manifest()?;
        }
        fs::create_dir_all(path.parent().unwrap_or(&self.dir))?;
        if existing.as_deref() != Some(bytes) {
            fs::write_atomic(&path, bytes)?;
        }
        Ok(())
    }

    fn save_manifest(&self) -> Result<()> {
        let manifest = serde_json::to_vec_pretty(&self.manifest)?;
        fs::write_atomic(&self.dir.join(MANIFEST), &manifest)
    }

    fn check_is_own(&self, name: &str) -> Result<()> {
        let path = self.dir.join(name);
        if !path.exists() {
            return Ok(());
        }
        let bytes = fs::read(&path)?;
        let hashes = self.manifest.files.get(name);
        if !hashes.is_some_and(|hashes| hashes.contains(&hash(&bytes))) {
            bail!(Exit::Usage(format!(
                "{} is not a file that the demo wrote, or was changed since, and the demo would overwrite it: move it \
                 away, or choose another folder with --dir",
                path.display()
            )));
        }
        Ok(())
    }
}

fn shipped_hashes(shipped: &[(&str, &[u8])]) -> BTreeMap<String, BTreeSet<String>> {
    let hashes = shipped.iter().map(|(name, bytes)| {
        let hashes = BTreeSet::from([hash(bytes)]);
        ((*name).to_owned(), hashes)
    });
    hashes.collect()
}

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Checks that a folder does not exist or is empty. Hidden files are ignored: they may be the desktop's.
fn check_is_empty(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let cannot_read = || format!("cannot read {}", dir.display());
    for entry in std::fs::read_dir(dir).with_context(cannot_read)? {
        let name = entry.with_context(cannot_read)?.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with('.') {
            bail!(Exit::Usage(format!(
                "{} holds {name}, which the demo did not write: choose an empty folder with --dir",
                dir.display()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 2] = ["prompts.jsonl", "kl.toml"];

    const SIZES: Sizes = Sizes {
        prompts: 200,
        heldout: 60,
        steps: 30,
    };

    fn open(dir: &Path) -> Result<DemoFolder> {
        open_with(dir, SIZES)
    }

    fn open_with(dir: &Path, sizes: Sizes) -> Result<DemoFolder> {
        let shipped: &[(&str, &[u8])] = &[("prompts.jsonl", b"shipped")];
        DemoFolder::open(dir, NAMES.into_iter(), shipped, sizes)
    }

    #[test]
    fn demo_with_other_sizes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).unwrap().write("kl.toml", b"old").unwrap();
        let sizes = Sizes {
            prompts: 100,
            ..SIZES
        };
        let error = open_with(dir.path(), sizes).err().unwrap();
        let message = error.to_string();
        assert_eq!(Exit::code_of(&error), 2, "{message}");
        let flags = "--prompts 200 --heldout 60 --steps 30";
        assert!(
            message.contains(flags) && message.contains("--dir"),
            "{message}"
        );
    }

    #[track_caller]
    fn assert_refused(dir: &Path, name: &str) {
        let error = open(dir).err().unwrap();
        let message = error.to_string();
        assert_eq!(Exit::code_of(&error), 2, "{message}");
        assert!(
            message.contains(name) && message.contains("--dir"),
            "{message}"
        );
    }

    #[test]
    fn demo_refuses_a_folder_with_files_of_the_user() {
        for name in ["prompts.jsonl", "kl.toml", "notes.txt"] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(name), "mine").unwrap();
            assert_refused(dir.path(), name);
        }
    }

    #[test]
    fn demo_resumes_its_own_folder_with_another_port() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(".hidden"), "").unwrap();
        for port in ["8017", "8018", "8017"] {
            let mut folder = open(dir.path()).unwrap();
            folder.write("teacher/config.json", b"{}").unwrap();
            folder.write("kl.toml", port.as_bytes()).unwrap();
            let text = std::fs::read_to_string(dir.path().join("kl.toml")).unwrap();
            assert_eq!(text, port);
        }
    }

    #[test]
    fn demo_resumes_a_folder_of_a_version_without_a_manifest() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("prompts.jsonl"), "shipped").unwrap();
        std::fs::write(dir.path().join("kl.toml"), "edited").unwrap();
        std::fs::create_dir(dir.path().join("kl")).unwrap();
        open(dir.path())
            .unwrap()
            .write("kl.toml", b"port 8018")
            .unwrap();
        let previous = std::fs::read_to_string(dir.path().join("kl.toml.previous"));
        assert_eq!(previous.unwrap(), "edited");
        open(dir.path()).unwrap();
        std::fs::write(dir.path().join("kl.toml"), "mine").unwrap();
        assert_refused(dir.path(), "kl.toml");
    }

    /// After the kill, the manifest lists the new content; the file has the old content, or does not exist.
    #[test]
    fn demo_resumes_after_a_kill_between_manifest_and_file() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).unwrap().write("kl.toml", b"old").unwrap();
        open(dir.path()).unwrap().write("kl.toml", b"new").unwrap();
        std::fs::write(dir.path().join("kl.toml"), "old").unwrap();
        open(dir.path()).unwrap();
        std::fs::remove_file(dir.path().join("kl.toml")).unwrap();
        open(dir.path()).unwrap();
    }

    #[test]
    fn demo_refuses_to_overwrite_a_file_that_the_user_changed() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).unwrap().write("kl.toml", b"old").unwrap();
        std::fs::write(dir.path().join("kl.toml"), "mine").unwrap();
        assert_refused(dir.path(), "kl.toml");
        std::fs::write(dir.path().join("kl.toml"), "old").unwrap();
        std::fs::write(dir.path().join("prompts.jsonl"), "mine").unwrap();
        assert_refused(dir.path(), "prompts.jsonl");
    }
}
