//! `distill cache export`: writes the cache in the format of another trainer.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::json;

use super::{json_line, load_config, print};
use crate::cli::{CacheLocation, ConfigFile, ExportArgs, ExportFormat, GlobalArgs};
use crate::config::{self, Groups};
use crate::data::groups::Selection;
use crate::exit::Exit;
use crate::export::rows::{ExportReport, ExportSettings};
use crate::export::{self, Format};
use crate::fs::{follow_link, is_same, is_stream};
use crate::terminal::{format_count, sanitise};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat_template::TemplateClock;

/// Version of the JSON output of `distill cache export`.
const VERSION: u32 = 1;

/// Writes the export and prints its counts.
///
/// # Errors
/// [`Exit::Usage`] for invalid flags or a path in the cache folder. Other errors if the cache cannot be read or the
/// export cannot be written.
pub(crate) fn run(args: &ExportArgs, global: &GlobalArgs) -> Result<()> {
    let format = export_format(args.to);
    if args.tokenizer.is_some() && format != Format::Axolotl {
        bail!(Exit::Usage(
            "--tokenizer is only for `--to axolotl`, the only format with token ids: omit --tokenizer"
                .into()
        ));
    }
    let groups = (!args.groups.is_empty()).then(|| Groups::parse(args.groups.clone()));
    let groups = groups.transpose();
    let groups = groups.map_err(|problem| Exit::Usage(format!("--groups: {problem}")))?;
    let (folder, data, selection) = load_source(&args.location, groups)?;
    check_outside(&args.out, &folder)?;
    let mut tokenizer = args.tokenizer.as_deref().map(Tokenizer::load).transpose()?;
    if let Some(tokenizer) = &mut tokenizer {
        tokenizer.set_date(TemplateClock::Record);
    }
    let settings = ExportSettings {
        data: &data,
        selection: &selection,
        tokenizer: tokenizer.as_ref(),
        force: args.force,
    };
    if data
        .source
        .as_deref()
        .is_some_and(|source| is_same(source, &args.out))
    {
        bail!(Exit::Usage(format!(
            "{} is `data.source` of the config: choose another path",
            args.out.display()
        )));
    }
    let records = crate::cache::reader::read(&folder)?;
    let report = match export::write(records, format, &args.out, &settings) {
        // The reader of a pipe has enough rows, as in `-o /dev/stdout | head`.
        Err(error) if is_stream(&args.out) && is_broken_pipe(&error) => return Ok(()),
        report => report?,
    };
    let text = if global.json {
        json_line(&json!({
            "version": VERSION,
            "file": args.out,
            "rows": report.rows,
            "left_out": report.left_out,
            "dropped_alternatives": report.dropped_alternatives,
        }))?
    } else {
        report_text(&report, &args.out)
    };
    // A program that reads the export from a pipe must not read the counts as well.
    if is_stream(&args.out) {
        // `eprint!` would panic if stderr is closed.
        let _ = write!(std::io::stderr(), "{text}");
        return Ok(());
    }
    print(&text)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
    causes.any(|cause: &std::io::Error| cause.kind() == ErrorKind::BrokenPipe)
}

fn export_format(format: ExportFormat) -> Format {
    match format {
        ExportFormat::Hf => Format::Hf,
        ExportFormat::OpenaiFt => Format::OpenaiFt,
        ExportFormat::Trl => Format::Trl,
        ExportFormat::Axolotl => Format::Axolotl,
        ExportFormat::Parquet => Format::Parquet,
    }
}

/// Returns the cache folder, the data settings, and the groups of answers to export.
fn load_source(
    location: &CacheLocation,
    groups: Option<Groups>,
) -> Result<(PathBuf, config::DataConfig, Selection)> {
    match (&location.dir, &location.config) {
        (Some(dir), _) => {
            let selection = match groups {
                None | Some(Groups::All) => Selection::All,
                Some(Groups::Named(names)) => crate::plan::questions::named(dir, names)?,
                Some(Groups::Asked) => bail!(Exit::Usage(
                    "`--groups asked` needs the questions of a config: give -c FILE instead of --dir".into()
                )),
            };
            Ok((dir.clone(), config::DataConfig::default(), selection))
        }
        (None, Some(file)) => {
            let file = ConfigFile {
                file: file.clone(),
                set: Vec::new(),
            };
            let mut config = load_config(&file)?.config;
            if let Some(groups) = groups {
                config.data.groups = groups;
            }
            let selection = crate::plan::questions::selection(&config)?;
            Ok((config.training_cache(), config.data, selection))
        }
        (None, None) => Err(Exit::Usage("give -c FILE or --dir DIR".into()).into()),
    }
}

/// Refuses an export into the cache folder, where it could replace paid answers.
fn check_outside(out: &Path, cache: &Path) -> Result<()> {
    let absolute = std::path::absolute(follow_link(out))?;
    let parent = absolute.parent().unwrap_or(&absolute);
    // If one of the two folders does not exist, the export cannot replace a file of the cache.
    let (Ok(parent), Ok(cache)) = (parent.canonicalize(), cache.canonicalize()) else {
        return Ok(());
    };
    if parent.starts_with(&cache) {
        bail!(Exit::Usage(format!(
            "{} is in the cache folder: choose a path outside it",
            out.display()
        )));
    }
    Ok(())
}

/// Formats the counts for a terminal.
fn report_text(report: &ExportReport, out: &Path) -> String {
    let mut text = format!("{} rows in {}\n", format_count(report.rows), out.display());
    for (reason, count) in &report.left_out {
        let reason = reason.replace('\n', " ");
        text += &format!("left out {}: {reason}\n", format_count(*count));
    }
    if let Some(dropped @ 1..) = report.dropped_alternatives {
        text += &format!(
            "dropped {} top-k alternatives that have no token in the tokenizer\n",
            format_count(dropped)
        );
    }
    sanitise(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_reasons_and_paths_are_escaped() {
        let mut report = ExportReport::default();
        let reason = "finish_reason `\u{1b}[2J\u{202e}` is not kept";
        report.left_out.insert(reason.into(), 1);
        let text = report_text(&report, Path::new("\u{9b}31m"));
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text}");
        assert!(!text.contains('\u{202e}'), "{text}");
    }
}
