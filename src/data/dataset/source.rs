//! Sources of rows: the teacher's answers in a cache, or a file of conversations.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::rows::{self, SkippedRow, TrainingRow};
use crate::cache::reader::{CacheLines, LineLocation};
use crate::cache::view::RecordView;
use crate::data::groups::Selection;
use crate::exit::Exit;
use crate::{cache, config, fs};

/// A chunk ends at the first line that brings it to this number of bytes. Chunks are large enough that threads rarely
/// wait for the reader, and small enough that all threads finish at about the same time.
const CHUNK_BYTES: usize = 1 << 20;
/// Maximum number of lines in a chunk.
const MAX_CHUNK_LINES: usize = 64;

/// Number of bytes that are hashed at a time.
const HASH_BUFFER_BYTES: usize = 4 << 20;

/// Source of the rows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum DataSource {
    /// A cache folder.
    Cache(PathBuf),
    /// A JSONL file of `{"messages": [{"role", "content"}, ...]}`, compressed if its name ends in `.gz`. Every answer
    /// in it is supervised.
    File(PathBuf),
}

impl DataSource {
    /// Returns the file `data.source`, or, if it is not set, the cache `data.cache` or the run's own cache.
    pub(crate) fn new(settings: &config::DataConfig, run_dir: &Path) -> Self {
        match &settings.source {
            None => Self::Cache(settings.cache_folder(run_dir)),
            Some(path) => Self::File(path.clone()),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Cache(path) | Self::File(path) => path,
        }
    }

    fn files(&self) -> Vec<PathBuf> {
        match self {
            Self::Cache(dir) => vec![cache::compressed_file(dir), cache::plain_file(dir)],
            Self::File(path) => vec![path.clone()],
        }
    }

    /// Returns the size of the files that exist, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        let sizes = self.files().into_iter().filter_map(|path| {
            let metadata = path.metadata().ok()?;
            Some(metadata.len())
        });
        sizes.sum()
    }

    /// Checks that a cache exists. A file is checked when it is opened.
    ///
    /// # Errors
    /// [`Exit::Usage`] if the cache does not exist.
    fn check(&self) -> Result<()> {
        match self {
            Self::Cache(dir) if !cache::exists(dir) => bail!(Exit::Usage(format!(
                "no cache found in {}; run `distill harvest` first, or set `data.source`",
                dir.display()
            ))),
            _ => Ok(()),
        }
    }

    /// Adds the kind and the content to a hash.
    ///
    /// # Errors
    /// If the source cannot be read.
    pub(crate) fn hash(&self, hash: &mut blake3::Hasher) -> Result<()> {
        self.check()?;
        hash.update(match self {
            Self::Cache(_) => b"cache",
            Self::File(_) => b"file.",
        });
        for path in self.files() {
            let length = hash_file(&path, hash)
                .with_context(|| format!("could not read {}", path.display()))?;
            hash.update(&length.to_le_bytes());
        }
        Ok(())
    }

    /// Calls `each` with every row, or the reason to leave it out, until `each` returns false.
    ///
    /// # Errors
    /// If the source cannot be read, or a row of a file is invalid.
    pub(crate) fn for_each_row(
        &self,
        selected: (&config::DataConfig, &Selection),
        mut each: impl FnMut(Result<TrainingRow, Box<SkippedRow>>) -> bool,
    ) -> Result<()> {
        let mut reader = self.open()?;
        let mut chunk = LineChunk::default();
        let mut wants_more = true;
        while wants_more && reader.next(&mut chunk)? {
            let read = chunk.rows(self, selected, |_, row| {
                wants_more = wants_more && each(row);
                Ok(())
            });
            read.map_err(|failure| failure.error)?;
        }
        Ok(())
    }

    /// Opens the source for reading.
    ///
    /// # Errors
    /// If the source cannot be read.
    pub(crate) fn open(&self) -> Result<SourceReader> {
        self.check()?;
        let lines = match self {
            Self::Cache(dir) => LineReader::Cache(Box::new(CacheLines::open(dir)?)),
            Self::File(path) => {
                let lines = fs::open_data(path)
                    .with_context(|| format!("reading `data.source` {}", path.display()))?;
                LineReader::File {
                    path: path.clone(),
                    lines,
                }
            }
        };
        Ok(SourceReader {
            lines,
            number: 0,
            bytes: 0,
            is_at_end: false,
        })
    }
}

/// Hashes the content of a file and returns its length in bytes. A missing file has length 0.
fn hash_file(path: &Path, hash: &mut blake3::Hasher) -> std::io::Result<u64> {
    let mut file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        file => file?,
    };
    let mut length = 0;
    let mut buffer = Vec::with_capacity(HASH_BUFFER_BYTES);
    loop {
        buffer.clear();
        let read = std::io::Read::take(&mut file, HASH_BUFFER_BYTES as u64);
        if std::io::Read::read_to_end(&mut { read }, &mut buffer)? == 0 {
            return Ok(length);
        }
        hash.update_rayon(&buffer);
        length += buffer.len() as u64;
    }
}

/// Reads the lines of a source.
pub(crate) struct SourceReader {
    lines: LineReader,
    /// Number of lines read.
    number: u64,
    /// Number of bytes read: of a cache as stored, of a compressed file of conversations after decompression.
    bytes: u64,
    /// True after the last line.
    is_at_end: bool,
}

enum LineReader {
    Cache(Box<CacheLines>),
    File {
        path: PathBuf,
        lines: Box<dyn BufRead + Send>,
    },
}

/// An error, and the number of the line at which it occurred.
pub(crate) struct SourceError {
    pub line: u64,
    pub error: anyhow::Error,
}

/// Consecutive lines of a source.
#[derive(Default)]
pub(crate) struct LineChunk {
    text: Vec<u8>,
    lines: Vec<ChunkLine>,
}

struct ChunkLine {
    number: u64,
    /// End of the line in the text of the chunk.
    end: usize,
    /// Location in the cache; None in a file.
    location: Option<LineLocation>,
}

impl SourceReader {
    /// Reads the next lines into `chunk`. Returns false at the end.
    ///
    /// # Errors
    /// If the source cannot be read or is damaged.
    pub(crate) fn next(&mut self, chunk: &mut LineChunk) -> Result<bool> {
        chunk.text.clear();
        chunk.lines.clear();
        while !self.is_at_end
            && chunk.text.len() < CHUNK_BYTES
            && chunk.lines.len() < MAX_CHUNK_LINES
        {
            self.read_line(chunk)?;
        }
        Ok(!chunk.lines.is_empty())
    }

    fn read_line(&mut self, chunk: &mut LineChunk) -> Result<()> {
        let text = &mut chunk.text;
        let location = match &mut self.lines {
            LineReader::Cache(lines) => {
                if !lines.advance().map_err(|error| lines.refuse_scan(error))? {
                    lines.warn_of_torn();
                    self.is_at_end = true;
                    return Ok(());
                }
                text.extend_from_slice(lines.line());
                self.bytes = lines.position();
                Some(lines.location())
            }
            LineReader::File { path, lines } => {
                let length = lines.read_until(b'\n', text);
                let length =
                    length.with_context(|| format!("reading `data.source` {}", path.display()))?;
                self.is_at_end = length == 0;
                self.bytes += length as u64;
                None
            }
        };
        self.number += 1;
        chunk.lines.push(ChunkLine {
            number: self.number,
            end: chunk.text.len(),
            location,
        });
        Ok(())
    }

    /// Number of lines read so far.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Number of bytes read so far: of a cache as stored, of a compressed file of conversations after decompression.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl LineChunk {
    /// Calls `each` with the number and the row of each line, or the reason to leave it out. Empty lines are skipped.
    ///
    /// # Errors
    /// At the first line that is invalid, or for which `each` fails.
    pub(crate) fn rows(
        &self,
        source: &DataSource,
        (settings, selection): (&config::DataConfig, &Selection),
        mut each: impl FnMut(u64, Result<TrainingRow, Box<SkippedRow>>) -> Result<()>,
    ) -> Result<(), SourceError> {
        let mut start = 0;
        for line in &self.lines {
            let text = &self.text[start..line.end];
            start = line.end;
            let row = match (source, &line.location) {
                (DataSource::Cache(dir), Some(location)) => RecordView::from_line(text)
                    .map(|record| Some(rows::from_record(record, settings, selection)))
                    .map_err(|fault| location.refuse(dir, fault)),
                (source, _) => parse_line(text, line.number, settings)
                    .map(|row| row.map(Ok))
                    .map_err(|error| {
                        let place = format!("{}:{}", source.path().display(), line.number);
                        Exit::Usage(format!("{place}: {error:#}")).into()
                    }),
            };
            let result = match row {
                Ok(Some(row)) => each(line.number, row),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            result.map_err(|error| SourceError {
                line: line.number,
                error,
            })?;
        }
        Ok(())
    }
}

fn parse_line(
    line: &[u8],
    number: u64,
    settings: &config::DataConfig,
) -> Result<Option<TrainingRow<'static>>> {
    let line = std::str::from_utf8(line).context("the line is not valid UTF-8")?;
    if line.trim().is_empty() {
        return Ok(None);
    }
    rows::from_line(line, number, settings).map(Some)
}

/// Callback for progress: its arguments are [`SourceReader::bytes`] and [`DataSource::bytes`]. An error stops the
/// reading.
pub(crate) type OnProgress<'a> = &'a mut (dyn FnMut(u64, u64) -> Result<()> + Send);

/// Returns the hash of a prompt id, which decides whether the answers to the prompt are for training or for validation.
pub(crate) fn prompt_hash(prompt_id: &str) -> u32 {
    let [a, b, c, d, ..] = *blake3::hash(prompt_id.as_bytes()).as_bytes();
    u32::from_be_bytes([a, b, c, d])
}
