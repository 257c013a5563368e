//! Opens a cache: reads its keys, and repairs its files after a crash.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};

use crate::cache::files::{OnReadProgress, length, size};
use crate::cache::frames::{self, FrameScan};
use crate::cache::index::{self, KeyIndex};
use crate::cache::keys::{self, KeyAndChecksum, KeySet};
use crate::cache::question::KeyVariants;
use crate::cache::reader::CacheLines;
use crate::cache::recovery::{FileEnding, LineScan};
use crate::cache::storage::{self, WrapFile};
use crate::cache::verify_parallel::{self, VerifiedBlock};
use crate::cache::{compressed_file, damaged, line, plain_file, refusal, torn_file};

/// Maximum number of bytes of a torn frame from which records are rescued.
const MAX_TORN_FRAME_BYTES: u64 = 1 << 30;

/// Contents of an opened cache.
#[derive(Debug, Default)]
pub struct CacheContents {
    pub keys: KeySet,
    /// Kinds of alternative keys among the records.
    pub key_variants: KeyVariants,
    /// Number of records with the key of an earlier record.
    pub repeated: u64,
    /// Cost of all records in US dollars.
    pub cost_usd: f64,
    /// Length in bytes of the complete lines in the plain file.
    pub plain: u64,
    /// Length in bytes of the complete frames in the compressed file.
    pub compressed: u64,
}

/// Reads the cache in `dir`, from its index if the index is valid, or else from all records. Creates the plain file if
/// it does not exist. Torn tails are moved to another file with a warning. The caller must hold the lock of the cache.
///
/// # Errors
/// If the cache is damaged ([`crate::exit::Exit::Damaged`]), or its files cannot be read or repaired.
pub fn open(dir: &Path, wrap: &WrapFile, on_progress: OnReadProgress<'_>) -> Result<CacheContents> {
    let index = index::load(dir);
    storage::remove_leftover(&plain_file(dir));
    storage::remove_leftover(&compressed_file(dir));
    let mut file = storage::open_or_create(&plain_file(dir))?;
    let plain_length = length(&plain_file(dir))?;
    let compressed_length = length(&compressed_file(dir))?;
    if let Some(KeyIndex {
        keys,
        key_variants,
        repeated,
        cost_usd,
    }) = index
    {
        return Ok(CacheContents {
            keys,
            key_variants,
            repeated,
            cost_usd,
            plain: plain_length,
            compressed: compressed_length,
        });
    }
    let total = plain_length + compressed_length;
    let mut compressed = FileContents::default();
    if compressed_length > 0 {
        compressed = read_compressed(&compressed_file(dir), &mut |bytes| {
            on_progress(bytes, total)
        })?;
    }
    let mut plain = read_plain(&mut file, &plain_file(dir), &mut |bytes| {
        on_progress(compressed_length + bytes, total)
    })?;
    repair_plain(&mut file, dir, &mut plain)
        .with_context(|| format!("could not repair {}", plain_file(dir).display()))?;
    if let FileEnding::Torn(_) = compressed.ending {
        repair_compressed(&mut file, dir, &compressed, &mut plain)
            .with_context(|| format!("could not repair {}", compressed_file(dir).display()))?;
    }
    drop(file);
    remove_compressed_from_plain(dir, &compressed, &mut plain, wrap)?;
    crate::fs::sync_folder(dir).with_context(|| format!("could not sync {}", dir.display()))?;
    Ok(combine(compressed, plain))
}

/// Contents of a cache, read without its lock and without repairing its files.
#[derive(Debug, Default)]
pub struct Peek {
    keys: KeySet,
    /// Kinds of alternative keys among the records.
    pub key_variants: KeyVariants,
    /// Cost of all records in US dollars.
    pub cost_usd: f64,
    /// Size of the cache files in bytes.
    bytes: u64,
}

impl Peek {
    /// Returns true if a record has the key `key`.
    pub fn contains(&self, key: &str) -> bool {
        self.keys
            .contains(&crate::cache::fingerprint::fingerprint(key))
    }

    /// Number of keys with a record.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Size of the cache files in bytes per key; in total if there is no key.
    pub(crate) fn bytes_per_record(&self) -> f64 {
        self.bytes as f64 / self.keys.len().max(1) as f64
    }
}

/// Reads the keys of the cache in `dir`, from its index if the index is valid, or else from all records. Another
/// process may write the cache at the same time. A cache that does not exist is empty.
///
/// # Errors
/// If the cache cannot be read or is damaged.
pub fn peek(dir: &Path) -> Result<Peek> {
    let mut peek = Peek {
        bytes: size(dir),
        ..Peek::default()
    };
    if !crate::cache::exists(dir) {
        return Ok(peek);
    }
    crate::cache::check_files(dir)?;
    if let Some(index) = index::load(dir) {
        (peek.keys, peek.key_variants, peek.cost_usd) =
            (index.keys, index.key_variants, index.cost_usd);
        return Ok(peek);
    }
    let mut lines = CacheLines::open(dir)?;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        let line = lines.line();
        let (key, _) = keys::identity(line).map_err(|fault| lines.refuse(fault))?;
        peek.cost_usd += line::cost_usd(line).map_err(|fault| lines.refuse(fault))?;
        let head = line::head(line).map_err(|fault| lines.refuse(fault))?;
        peek.key_variants.insert(head.v, head.cut_at);
        peek.keys.insert(key);
    }
    lines.warn_of_torn();
    Ok(peek)
}

/// Callback with the number of bytes read from a file.
type OnBytes<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// Contents of the plain or the compressed file.
#[derive(Debug)]
struct FileContents {
    records: Vec<KeyAndChecksum>,
    key_variants: KeyVariants,
    cost_usd: f64,
    /// Length in bytes of the complete lines or frames.
    bytes: u64,
    /// Length of the file in bytes.
    length: u64,
    ending: FileEnding,
}

impl Default for FileContents {
    fn default() -> Self {
        Self {
            records: Vec::new(),
            key_variants: KeyVariants::default(),
            cost_usd: 0.0,
            bytes: 0,
            length: 0,
            ending: FileEnding::Clean,
        }
    }
}

impl FileContents {
    fn add(&mut self, block: VerifiedBlock, on_progress: OnBytes<'_>) -> Result<()> {
        self.records.extend(block.records);
        self.key_variants.add(&block.key_variants);
        self.cost_usd += block.cost_usd;
        self.bytes += block.bytes;
        on_progress(self.bytes)
    }

    /// Sets the length and the ending of the file after a scan has reached its end.
    fn with_end(mut self, length: u64, ending: FileEnding) -> FileContents {
        self.length = length;
        self.bytes = match &ending {
            FileEnding::Torn(bad) => bad.offset,
            FileEnding::Clean | FileEnding::Unterminated => length,
        };
        self.ending = ending;
        self
    }

    fn add_line(&mut self, line: &[u8]) -> Result<(), line::LineError> {
        self.records.push(keys::identity(line)?);
        let head = line::head(line)?;
        self.key_variants.insert(head.v, head.cut_at);
        self.cost_usd += line::cost_usd(line)?;
        Ok(())
    }
}

fn read_plain(file: &mut File, path: &Path, on_progress: OnBytes<'_>) -> Result<FileContents> {
    let mut contents = FileContents::default();
    let could_not_read = || format!("could not read {}", path.display());
    verify_parallel::verify_plain(&mut *file, path, |block| contents.add(block, on_progress))?;
    // Continues at the first line that the parallel pass did not accept.
    file.seek(SeekFrom::Start(contents.bytes))
        .with_context(could_not_read)?;
    let reader = BufReader::with_capacity(1 << 20, file);
    let mut scan = LineScan::starting_at(reader, contents.bytes, contents.records.len() as u64);
    while scan.advance().map_err(|error| refusal(path, error))? {
        contents
            .add_line(scan.line())
            .map_err(|fault| damaged(path, &scan.bad(fault)))?;
        on_progress(scan.position())?;
    }
    Ok(contents.with_end(scan.position(), scan.ending()))
}

fn read_compressed(path: &Path, on_progress: OnBytes<'_>) -> Result<FileContents> {
    let mut contents = FileContents::default();
    let could_not_read = || format!("could not read {}", path.display());
    let file = || File::open(path).with_context(could_not_read);
    contents.length = length(path)?;
    verify_parallel::verify_compressed(file()?, path, |block| contents.add(block, on_progress))?;
    if contents.bytes == contents.length {
        return Ok(contents);
    }
    // Reads the file again from its start, to find where and how the frames end.
    let mut scan = FrameScan::new(file()?);
    contents.records.clear();
    contents.cost_usd = 0.0;
    while scan.advance().map_err(|error| refusal(path, error))? {
        contents
            .add_line(scan.line())
            .map_err(|fault| damaged(path, &scan.bad(fault)))?;
    }
    Ok(contents.with_end(scan.position(), scan.ending()))
}

fn warn_of_torn_line(path: &Path, contents: &FileContents, torn_file: &Path) {
    tracing::warn!(
        "{}: an incomplete record at its end ({} bytes from byte {}) is moved to {}; its prompt will be requested again",
        path.display(),
        contents.length - contents.bytes,
        contents.bytes,
        torn_file.display()
    );
}

/// Completes a last line without a newline, or moves a torn tail to another file.
fn repair_plain(file: &mut File, dir: &Path, plain: &mut FileContents) -> std::io::Result<()> {
    match plain.ending {
        FileEnding::Clean => {}
        FileEnding::Unterminated => {
            storage::append(file, b"\n")?;
            plain.bytes += 1;
        }
        FileEnding::Torn(_) => {
            let torn_file = torn_file(dir);
            warn_of_torn_line(&plain_file(dir), plain, &torn_file);
            storage::cut(file, plain.bytes, &torn_file)?;
        }
    }
    Ok(())
}

/// Moves a torn frame from the end of the compressed file to another file. After a crash its lines are still in the
/// plain file; a readable line with a key that the plain file lacks is appended to it.
fn repair_compressed(
    plain_file: &mut File,
    dir: &Path,
    compressed: &FileContents,
    plain: &mut FileContents,
) -> Result<()> {
    let path = compressed_file(dir);
    let mut torn = Vec::new();
    let mut frames = storage::open_or_create(&path)?;
    frames.seek(SeekFrom::Start(compressed.bytes))?;
    (&mut frames)
        .take(MAX_TORN_FRAME_BYTES)
        .read_to_end(&mut torn)?;
    let plain_keys: KeySet = plain.records.iter().map(|(key, _)| *key).collect();
    let mut rescued = Vec::new();
    for line in frames::salvage(&torn).split_inclusive(|&byte| byte == b'\n') {
        let content = line.trim_ascii_end();
        if !plain_keys.contains(&keys::identity(content)?.0) {
            plain.add_line(content)?;
            rescued.extend_from_slice(line);
        }
    }
    storage::append(plain_file, &rescued)?;
    plain.bytes += rescued.len() as u64;
    tracing::warn!(
        "{}: an incomplete frame at its end ({} bytes from byte {}) is moved to {}; its readable records are kept",
        path.display(),
        compressed.length - compressed.bytes,
        compressed.bytes,
        torn_file(dir).display()
    );
    storage::cut(&mut frames, compressed.bytes, &torn_file(dir))?;
    Ok(())
}

/// Removes from the plain file the lines that are also in the compressed file. A crash between the two steps of
/// compression leaves such lines.
fn remove_compressed_from_plain(
    dir: &Path,
    compressed: &FileContents,
    plain: &mut FileContents,
    wrap: &WrapFile,
) -> Result<()> {
    if compressed.records.is_empty() || plain.records.is_empty() {
        return Ok(());
    }
    let in_plain: HashSet<KeyAndChecksum> = plain.records.iter().copied().collect();
    let in_both: HashSet<KeyAndChecksum> = (compressed.records.iter().copied())
        .filter(|record| in_plain.contains(record))
        .collect();
    if in_both.is_empty() {
        return Ok(());
    }
    let path = plain_file(dir);
    let could_not_repair = || format!("could not repair {}", path.display());
    let mut remaining = FileContents::default();
    let file = File::open(&path).with_context(could_not_repair)?;
    let mut scan = LineScan::new(BufReader::with_capacity(1 << 20, file));
    let (_, length) = storage::replace(&path, wrap, |new| {
        while scan.advance().map_err(|error| refusal(&path, error))? {
            let line = scan.line();
            if !in_both.contains(&keys::identity(line)?) {
                remaining.add_line(line)?;
                new.append(line)?;
                new.append(b"\n")?;
            }
        }
        Ok(())
    })
    .with_context(could_not_repair)?;
    remaining.bytes = length;
    *plain = remaining;
    Ok(())
}

fn combine(compressed: FileContents, plain: FileContents) -> CacheContents {
    let record_count = compressed.records.len() + plain.records.len();
    let mut keys = KeySet::with_capacity_and_hasher(record_count, Default::default());
    keys.extend(compressed.records.into_iter().map(|(key, _)| key));
    keys.extend(plain.records.into_iter().map(|(key, _)| key));
    let mut key_variants = compressed.key_variants;
    key_variants.add(&plain.key_variants);
    CacheContents {
        key_variants,
        repeated: (record_count - keys.len()) as u64,
        keys,
        cost_usd: compressed.cost_usd + plain.cost_usd,
        plain: plain.bytes,
        compressed: compressed.bytes,
    }
}
