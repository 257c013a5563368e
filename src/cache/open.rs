//! Opens a cache: reads its keys, and repairs the files after a crash.

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

/// Contents of an opened cache.
#[derive(Debug, Default)]
pub struct CacheContents {
    pub keys: KeySet,
    pub key_variants: KeyVariants,
    /// Records that repeat a key.
    pub repeated: u64,
    pub cost_usd: f64,
    /// Bytes of the whole lines in the plain file.
    pub plain: u64,
    /// Bytes of the whole frames in the compressed file.
    pub compressed: u64,
}

/// Reads the cache in `dir`: its index if that is valid, or else all records. Torn tails are moved to another
/// file with a warning. Damage is an error ([`crate::exit::Exit::Damaged`]).
pub fn open(dir: &Path, wrap: &WrapFile, on_progress: OnReadProgress<'_>) -> Result<CacheContents> {
    let index = index::load(dir);
    storage::remove_leftover(&plain_file(dir));
    storage::remove_leftover(&compressed_file(dir));
    let mut file = storage::open_or_create(&plain_file(dir))?;
    let lengths = (length(&plain_file(dir))?, length(&compressed_file(dir))?);
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
            plain: lengths.0,
            compressed: lengths.1,
        });
    }
    let total = lengths.0 + lengths.1;
    let mut compressed = FileContents::default();
    if lengths.1 > 0 {
        compressed = read_compressed(&compressed_file(dir), &mut |bytes| {
            on_progress(bytes, total)
        })?;
    }
    let mut plain = read_plain(&mut file, &plain_file(dir), &mut |bytes| {
        on_progress(lengths.1 + bytes, total)
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

/// Contents of a cache, read without the lock.
#[derive(Debug, Default)]
pub struct Peek {
    keys: KeySet,
    pub key_variants: KeyVariants,
    pub cost_usd: f64,
    bytes: u64,
}

impl Peek {
    /// Returns true if a record has this key.
    pub fn contains(&self, key: &str) -> bool {
        self.keys
            .contains(&crate::cache::fingerprint::fingerprint(key))
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn bytes_per_record(&self) -> f64 {
        self.bytes as f64 / self.keys.len().max(1) as f64
    }
}

/// Reads the keys of the cache in `dir`, also while another process writes it: from its index if that is valid,
/// or else from all records. A cache that does not exist is empty.
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
        let known = keys::identity(line).and_then(|(key, _)| Ok((key, line::cost_usd(line)?)));
        let (key, cost_usd) = known.map_err(|fault| lines.refuse(fault))?;
        peek.keys.insert(key);
        let head = line::head(line).map_err(|fault| lines.refuse(fault))?;
        peek.key_variants.insert(head.v, head.cut_at);
        peek.cost_usd += cost_usd;
    }
    lines.warn_of_torn();
    Ok(peek)
}

/// Callback with the number of bytes read from a file.
type OnBytes<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// Contents of one of the two files.
#[derive(Debug)]
struct FileContents {
    records: Vec<KeyAndChecksum>,
    key_variants: KeyVariants,
    cost_usd: f64,
    /// Bytes of whole lines or frames.
    bytes: u64,
    /// Length of the file.
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

    /// Sets the length of the file, once it was read to its end, and how it ends.
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
    let mut part = FileContents::default();
    let could_not_read = || format!("could not read {}", path.display());
    verify_parallel::verify_plain(&mut *file, path, |block| part.add(block, on_progress))?;
    // Continues at the first line that the parallel pass did not accept.
    file.seek(SeekFrom::Start(part.bytes))
        .with_context(could_not_read)?;
    let reader = BufReader::with_capacity(1 << 20, file);
    let mut scan = LineScan::starting_at(reader, part.bytes, part.records.len() as u64);
    while scan.advance().map_err(|error| refusal(path, error))? {
        part.add_line(scan.line())
            .map_err(|fault| damaged(path, &scan.bad(fault)))?;
        on_progress(scan.position())?;
    }
    Ok(part.with_end(scan.position(), scan.ending()))
}

fn read_compressed(path: &Path, on_progress: OnBytes<'_>) -> Result<FileContents> {
    let mut part = FileContents::default();
    let could_not_read = || format!("could not read {}", path.display());
    let file = || File::open(path).with_context(could_not_read);
    part.length = length(path)?;
    verify_parallel::verify_compressed(file()?, path, |block| part.add(block, on_progress))?;
    if part.bytes == part.length {
        return Ok(part);
    }
    let mut scan = FrameScan::new(file()?);
    part.records.clear();
    part.cost_usd = 0.0;
    while scan.advance().map_err(|error| refusal(path, error))? {
        part.add_line(scan.line())
            .map_err(|fault| damaged(path, &scan.bad(fault)))?;
    }
    Ok(part.with_end(scan.position(), scan.ending()))
}

fn warn_torn(path: &Path, part: &FileContents, aside: &Path) {
    tracing::warn!(
        "{}: an incomplete record at its end ({} bytes from byte {}) is moved to {}; its prompt will be requested again",
        path.display(),
        part.length - part.bytes,
        part.bytes,
        aside.display()
    );
}

fn repair_plain(file: &mut File, dir: &Path, plain: &mut FileContents) -> std::io::Result<()> {
    match plain.ending {
        FileEnding::Clean => {}
        FileEnding::Unterminated => {
            storage::append(file, b"\n")?;
            plain.bytes += 1;
        }
        FileEnding::Torn(_) => {
            let aside = torn_file(dir);
            warn_torn(&plain_file(dir), plain, &aside);
            storage::cut(file, plain.bytes, &aside)?;
        }
    }
    Ok(())
}

/// Cuts off a torn frame. After a crash its lines are in the plain file as well; any other line that can still be
/// read is appended there.
fn repair_compressed(
    file: &mut File,
    dir: &Path,
    compressed: &FileContents,
    plain: &mut FileContents,
) -> Result<()> {
    let path = compressed_file(dir);
    let mut torn = Vec::new();
    let mut frames = storage::open_or_create(&path)?;
    frames.seek(SeekFrom::Start(compressed.bytes))?;
    (&mut frames).take(1 << 30).read_to_end(&mut torn)?;
    let known: KeySet = plain.records.iter().map(|(key, _)| *key).collect();
    let mut rescued = Vec::new();
    for line in frames::salvage(&torn).split_inclusive(|&byte| byte == b'\n') {
        let bare = line.trim_ascii_end();
        if !known.contains(&keys::identity(bare)?.0) {
            plain.add_line(bare)?;
            rescued.extend_from_slice(line);
        }
    }
    storage::append(file, &rescued)?;
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

/// Removes from the plain file the lines that are in the compressed file as well, as a crash between the two
/// steps of compressing leaves them.
fn remove_compressed_from_plain(
    dir: &Path,
    compressed: &FileContents,
    plain: &mut FileContents,
    wrap: &WrapFile,
) -> Result<()> {
    if compressed.records.is_empty() || plain.records.is_empty() {
        return Ok(());
    }
    let mut in_both: HashSet<KeyAndChecksum> = plain.records.iter().copied().collect();
    let in_frames: HashSet<_> = (compressed.records.iter().copied())
        .filter(|record| in_both.contains(record))
        .collect();
    in_both.retain(|record| in_frames.contains(record));
    if in_both.is_empty() {
        return Ok(());
    }
    let path = plain_file(dir);
    let could_not = || format!("could not repair {}", path.display());
    let mut rest = FileContents::default();
    let file = File::open(&path).with_context(could_not)?;
    let mut scan = LineScan::new(BufReader::with_capacity(1 << 20, file));
    let (_, length) = storage::replace(&path, wrap, |new| {
        while scan.advance().map_err(|error| refusal(&path, error))? {
            let line = scan.line();
            if !in_both.contains(&keys::identity(line)?) {
                rest.add_line(line)?;
                new.append(line)?;
                new.append(b"\n")?;
            }
        }
        Ok(())
    })
    .with_context(could_not)?;
    rest.bytes = length;
    *plain = rest;
    Ok(())
}

fn combine(compressed: FileContents, plain: FileContents) -> CacheContents {
    let records = compressed.records.len() + plain.records.len();
    let mut keys = KeySet::with_capacity_and_hasher(records, Default::default());
    keys.extend(compressed.records.into_iter().map(|(key, _)| key));
    keys.extend(plain.records.into_iter().map(|(key, _)| key));
    let mut key_variants = compressed.key_variants;
    key_variants.add(&plain.key_variants);
    CacheContents {
        key_variants,
        repeated: (records - keys.len()) as u64,
        keys,
        cost_usd: compressed.cost_usd + plain.cost_usd,
        plain: plain.bytes,
        compressed: compressed.bytes,
    }
}
