//! `distill data show`: prints examples token by token.

use std::io::IsTerminal;

use anyhow::{Result, bail};
use serde_json::json;

use super::{load_config, print, print_json};
use crate::cli::{DataArgs, DataCommand, GlobalArgs, ShowDataArgs};
use crate::data::dataset;
use crate::data::dataset::show::{ShownExample, ShownToken};
use crate::data::groups::ExclusionReason;
use crate::data::report::by_reason;
use crate::exit::Exit;
use crate::terminal::sanitise;
use crate::tokenizer::Tokenizer;

/// Version of the `--json` output.
const VERSION: u32 = 1;
/// Maximum number of soft labels of a token that are printed one by one.
const MAX_LABELS: usize = 5;
/// Minimum probability of a soft label that is printed.
const MIN_PROBABILITY: f64 = 5e-5;

/// Runs `distill data`.
///
/// # Errors
/// If the config, the student's tokenizer or the data cannot be loaded; [`Exit::Usage`] if no row matches or makes an
/// example.
pub fn run(args: &DataArgs, global: &GlobalArgs) -> Result<()> {
    match &args.command {
        DataCommand::Show(args) => show(args, global),
    }
}

fn show(args: &ShowDataArgs, global: &GlobalArgs) -> Result<()> {
    let config = load_config(&args.config)?.config;
    let tokenizer = Tokenizer::for_student(&config.student)?;
    let selection = crate::plan::questions::selection(&config)?;
    let id = args.id.as_deref();
    // A prompt id may name several records.
    let limit = match (args.limit, id) {
        (Some(limit), _) => usize::try_from(limit)?,
        (None, Some(_)) => usize::MAX,
        (None, None) => 1,
    };
    let (examples, skipped) = dataset::show(
        &config.data,
        &config.run_dir,
        &selection,
        &tokenizer,
        id,
        limit,
    )?;
    if examples.is_empty() {
        bail!(Exit::Usage(match id {
            Some(id) => format!(
                "no row matches \"{id}\": give the key of a record or at least its first six digits, a prompt id, \
                 or a line number in the file of conversations"
            ),
            None => {
                let advice = if skipped.contains_key(&ExclusionReason::Mock.to_string()) {
                    "; set `data.groups` to \"mock\" to use them"
                } else {
                    ""
                };
                format!("no row makes an example: {}{advice}", by_reason(&skipped))
            }
        }));
    }
    if global.json {
        return print_json(&json!({ "version": VERSION, "examples": examples }));
    }
    let style = ColourStyle::for_stdout();
    let texts: Vec<String> = examples
        .iter()
        .map(|example| format_example(example, style))
        .collect();
    print(&texts.join("\n"))
}

/// Colours of the output; none if stdout is not a terminal or `NO_COLOR` is set.
#[derive(Clone, Copy)]
struct ColourStyle {
    has_colour: bool,
}

impl ColourStyle {
    fn for_stdout() -> ColourStyle {
        let is_off = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        ColourStyle {
            has_colour: !is_off && std::io::stdout().is_terminal(),
        }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.has_colour {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    }

    /// Formats a token: green if it is supervised, cyan if it is a control token, bold cyan if it is both, else dim.
    fn token(self, token: &ShownToken) -> String {
        let code = match (token.is_supervised, token.is_special) {
            (true, true) => "1;36",
            (true, false) => "32",
            (false, true) => "36",
            (false, false) => "2",
        };
        self.paint(code, &visible(&token.text))
    }
}

/// Replaces line breaks and control characters by escape sequences.
fn visible(text: &str) -> String {
    let mut escaped = String::new();
    for char in text.chars() {
        if char.is_control() {
            escaped.extend(char.escape_default());
        } else {
            escaped.push(char);
        }
    }
    sanitise(&escaped).into_owned()
}

/// Formats an example: its origin, its text, and a table of its supervised tokens.
fn format_example(example: &ShownExample, style: ColourStyle) -> String {
    let mut text = format!(
        "{}  prompt {}\n",
        style.paint("1", &visible(&example.key)),
        visible(&example.prompt_id)
    );
    let mut line = |name: &str, value: Option<&str>| {
        if let Some(value) = value {
            text.push_str(&format!("{name}: {}\n", visible(value)));
        }
    };
    line("group", example.group.as_deref());
    line("left out", example.left_out.as_deref());
    line("cross-entropy only", example.ce_only.as_deref());
    if let Some(difference) = &example.difference {
        line(
            "prompt for generation ends with",
            Some(&difference.generation),
        );
        line(
            "rendered conversation has instead",
            Some(&difference.conversation),
        );
    }
    if example.tokens.is_empty() {
        return text;
    }
    if !example.source.is_empty() {
        let source = example.source.iter().map(|token| style.token(token));
        let source: Vec<String> = source.collect();
        text.push_str(&format!("source: {}\ndecoder: ", source.join("|")));
    }
    // The text, with `|` between tokens, and `>>>` and `<<<` around each run of supervised tokens.
    let mut is_supervised = false;
    for (position, token) in example.tokens.iter().enumerate() {
        if token.is_supervised != is_supervised {
            is_supervised = token.is_supervised;
            text.push_str(if is_supervised { "\n>>> " } else { " <<<\n" });
        } else if position > 0 {
            text.push('|');
        }
        text.push_str(&style.token(token));
        if token.text.ends_with('\n') {
            text.push('\n');
        }
    }
    text.push_str(if is_supervised { " <<<\n\n" } else { "\n\n" });
    let tokens = example.tokens.iter().enumerate();
    let supervised = tokens.filter(|(_, token)| token.is_supervised);
    let width = |token: &ShownToken| visible(&token.text).chars().count();
    let max_width = supervised.clone().map(|(_, token)| width(token)).max();
    let max_width = max_width.unwrap_or_default();
    for (position, token) in supervised {
        let padding = " ".repeat(max_width - width(token));
        text.push_str(&format!(
            "{position:>5} {:>7} {}{padding}  {}\n",
            token.id,
            style.token(token),
            labels(token)
        ));
    }
    text
}

/// Formats the targets of a supervised token: its soft labels, the tail, the probability of an emitted token outside
/// the top-k, and the probability of a text chunk.
fn labels(token: &ShownToken) -> String {
    let printed = token.soft_labels.iter().take(MAX_LABELS);
    let printed = printed.take_while(|label| label.probability >= MIN_PROBABILITY);
    let mut parts: Vec<String> = printed
        .map(|label| {
            let text = visible(&format!("{:?}", label.text));
            format!("{:.4} {text}", label.probability)
        })
        .collect();
    let others = &token.soft_labels[parts.len()..];
    if !others.is_empty() {
        let probability: f64 = others.iter().map(|label| label.probability).sum();
        parts.push(format!("{probability:.4} {} others", others.len()));
    }
    parts.extend(token.tail.map(|tail| format!("{tail:.4} tail")));
    parts.extend(token.emitted.map(|probability| {
        format!("emitted with probability {probability:.2e}, outside the top-k")
    }));
    parts.extend(
        token.chunk.map(|(probability, tokens)| {
            format!("{probability:.4} for the text of {tokens} tokens")
        }),
    );
    if parts.is_empty() {
        "cross-entropy".into()
    } else {
        parts.join("  ")
    }
}
