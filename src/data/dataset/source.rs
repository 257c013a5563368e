//! Where rows come from: the teacher's answers in a cache, or a file of conversations.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::rows::{self, Row, Skipped};
use crate::cache::reader::{CacheLines, LineLocation};
use crate::cache::view::RecordView;
use crate::data::groups::Selection;
use crate::exit::Exit;
use crate::{cache, config, fs};

/// Lines are handed out in portions of so many bytes: enough that threads do not wait for each
/// other, few enough that they end together.
const PORTION: usize = 1 << 20;
/// And of at most so many lines, where these are short.
const PORTION_LINES: usize = 64;

/// Bytes of a file that are hashed at a time.
const HASHED: usize = 4 << 20;

/// A source by its path.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    /// A cache folder.
    Cache(PathBuf),
    /// A JSONL file of `{"messages": [{"role", "content"}, ...]}`, packed if its name ends in `.gz`.
    /// Every answer in it is supervised.
    File(PathBuf),
}

impl Source {
    /// `data.source`, or the cache of this run where that is not set.
    pub(crate) fn of(config: &config::Config) -> Self {
        match &config.data.source {
            None => Self::Cache(config.training_cache()),
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

    /// Its size in bytes; 0 where there is none.
    pub(crate) fn bytes(&self) -> u64 {
        let sizes = self.files().into_iter().filter_map(|path| {
            let metadata = path.metadata().ok()?;
            Some(metadata.len())
        });
        sizes.sum()
    }

    /// # Errors
    /// [`Exit::Usage`] where there is no cache.
    fn check(&self) -> Result<()> {
        match self {
            Self::Cache(dir) if !cache::exists(dir) => bail!(Exit::Usage(format!(
                "there is no cache in {}; run `distill harvest` first, or set `data.source`",
                dir.display()
            ))),
            _ => Ok(()),
        }
    }

    /// Adds kind and content to a hash.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn hash(&self, hash: &mut blake3::Hasher) -> Result<()> {
        self.check()?;
        hash.update(match self {
            Self::Cache(_) => b"cache",
            Self::File(_) => b"file.",
        });
        for path in self.files() {
            let length = hash_file(&path, hash);
            let length = length.with_context(|| format!("could not read {}", path.display()))?;
            hash.update(&length.to_le_bytes());
        }
        Ok(())
    }

    /// Calls `each` with every row, or the reason to leave it out, until it returns false.
    ///
    /// # Errors
    /// If it cannot be read, or a row of a file is none.
    pub(crate) fn for_each_row(
        &self,
        selected: (&config::Data, &Selection),
        mut each: impl FnMut(Result<Row, Box<Skipped>>) -> bool,
    ) -> Result<()> {
        let (mut reader, mut portion) = (self.open()?, Portion::default());
        let mut is_wanted = true;
        while is_wanted && reader.next(&mut portion)? {
            let read = portion.rows(self, selected, |_, row| {
                is_wanted = is_wanted && each(row);
                Ok(())
            });
            read.map_err(|(_, error)| error)?;
        }
        Ok(())
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn open(&self) -> Result<Reader> {
        self.check()?;
        let kind = match self {
            Self::Cache(dir) => Kind::Cache(Box::new(CacheLines::open(dir)?)),
            Self::File(path) => {
                let lines = fs::open_data(path)
                    .with_context(|| format!("reading `data.source` {}", path.display()))?;
                Kind::File {
                    path: path.clone(),
                    lines,
                }
            }
        };
        Ok(Reader {
            kind,
            number: 0,
            bytes: 0,
            done: false,
        })
    }
}

/// The length of a file whose content was hashed. One that is not there has none.
fn hash_file(path: &Path, hash: &mut blake3::Hasher) -> std::io::Result<u64> {
    let mut file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        file => file?,
    };
    let mut length = 0;
    let mut buffer = Vec::with_capacity(HASHED);
    loop {
        buffer.clear();
        let read = std::io::Read::take(&mut file, HASHED as u64);
        if std::io::Read::read_to_end(&mut { read }, &mut buffer)? == 0 {
            return Ok(length);
        }
        hash.update_rayon(&buffer);
        length += buffer.len() as u64;
    }
}

/// Reads the lines of a source.
pub(crate) struct Reader {
    kind: Kind,
    /// Lines read.
    number: u64,
    bytes: u64,
    done: bool,
}

enum Kind {
    Cache(Box<CacheLines>),
    File {
        path: PathBuf,
        lines: Box<dyn BufRead + Send>,
    },
}

/// Some lines, in their order.
#[derive(Default)]
pub(crate) struct Portion {
    text: Vec<u8>,
    lines: Vec<Line>,
}

struct Line {
    number: u64,
    /// Where it ends in the text.
    end: usize,
    /// In a cache.
    place: Option<LineLocation>,
}

impl Reader {
    /// The next lines. False at the end.
    ///
    /// # Errors
    /// Where the source cannot be read or is damaged.
    pub(crate) fn next(&mut self, portion: &mut Portion) -> Result<bool> {
        portion.text.clear();
        portion.lines.clear();
        while !self.done && portion.text.len() < PORTION && portion.lines.len() < PORTION_LINES {
            self.line(portion)?;
        }
        Ok(!portion.lines.is_empty())
    }

    fn line(&mut self, portion: &mut Portion) -> Result<()> {
        let text = &mut portion.text;
        let place = match &mut self.kind {
            Kind::Cache(lines) => {
                if !lines.advance().map_err(|error| lines.refuse_scan(error))? {
                    lines.warn_of_torn();
                    self.done = true;
                    return Ok(());
                }
                text.extend_from_slice(lines.line());
                self.bytes = lines.position();
                Some(lines.place())
            }
            Kind::File { path, lines } => {
                let length = lines.read_until(b'\n', text);
                let length =
                    length.with_context(|| format!("reading `data.source` {}", path.display()))?;
                self.done = length == 0;
                self.bytes += length as u64;
                None
            }
        };
        self.number += 1;
        portion.lines.push(Line {
            number: self.number,
            end: portion.text.len(),
            place,
        });
        Ok(())
    }

    /// Lines read so far.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Bytes read so far; of a packed file, of what is in it.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Portion {
    /// Calls `each` with the number and the row of each line, or the reason to leave it out; empty
    /// lines are none.
    ///
    /// # Errors
    /// With the line's number: the first that is no row, or that `each` refuses.
    pub(crate) fn rows(
        &self,
        source: &Source,
        (settings, selection): (&config::Data, &Selection),
        mut each: impl FnMut(u64, Result<Row, Box<Skipped>>) -> Result<()>,
    ) -> Result<(), (u64, anyhow::Error)> {
        let mut start = 0;
        for line in &self.lines {
            let text = &self.text[start..line.end];
            start = line.end;
            let row = match (source, &line.place) {
                (Source::Cache(dir), Some(place)) => RecordView::from_line(text)
                    .map(|record| Some(rows::of_record(record, settings, selection)))
                    .map_err(|fault| place.refuse(dir, fault)),
                (source, _) => of_line(text, line.number, settings)
                    .map(|row| row.map(Ok))
                    .map_err(|error| {
                        let place = format!("{}:{}", source.path().display(), line.number);
                        Exit::Usage(format!("{place}: {error:#}")).into()
                    }),
            };
            let done = match row {
                Ok(Some(row)) => each(line.number, row),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            done.map_err(|error| (line.number, error))?;
        }
        Ok(())
    }
}

fn of_line(line: &[u8], number: u64, settings: &config::Data) -> Result<Option<Row<'static>>> {
    let line = std::str::from_utf8(line).context("it is no UTF-8")?;
    match line.trim().is_empty() {
        true => Ok(None),
        false => rows::of_line(line, number, settings).map(Some),
    }
}

/// Told how many bytes of how many have been read; may end the reading by an error.
pub(crate) type OnProgress<'a> = &'a mut (dyn FnMut(u64, u64) -> Result<()> + Send);

/// The part of a prompt id's hash that decides on which side of the split its answers fall.
pub(crate) fn prompt_hash(prompt_id: &str) -> u32 {
    let [a, b, c, d, ..] = *blake3::hash(prompt_id.as_bytes()).as_bytes();
    u32::from_be_bytes([a, b, c, d])
}
