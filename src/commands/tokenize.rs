//! `distill tokenize`: prints the tokens of a text.

use std::io::Read;

use anyhow::{Context, Result};
use serde_json::json;

use super::{print, print_json};
use crate::cli::{GlobalArgs, TokenizeArgs};
use crate::data::dataset::show::text_of;
use crate::prompt::message::Message;
use crate::terminal::{sanitise, table};
use crate::tokenizer::Tokenizer;

/// Version of the `--json` output.
const VERSION: u32 = 1;

/// Prints the id and the text of each token.
pub fn run(args: &TokenizeArgs, global: &GlobalArgs) -> Result<()> {
    let mut tokenizer = Tokenizer::load(&args.model)?;
    tokenizer.use_clock();
    let text = match args.text.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin()
                .lock()
                .read_to_string(&mut text)
                .context("cannot read the text from stdin")?;
            text
        }
        text => text.to_owned(),
    };
    let ids = if args.chat {
        tokenizer.encode_prompt(&[Message::new("user", text)])?
    } else {
        tokenizer.encode_text(&text)?
    };
    let tokens = ids.iter().map(|&id| (id, text_of(&tokenizer, id)));
    if global.json {
        let tokens = tokens.map(|(id, text)| {
            json!({
                "id": id,
                "text": text,
                "bytes": tokenizer.token_bytes(id),
                "is_special": tokenizer.is_special(id),
            })
        });
        let tokens: Vec<_> = tokens.collect();
        return print_json(&json!({ "version": VERSION, "tokens": tokens }));
    }
    let rows = tokens.map(|(id, text)| {
        let printed = if tokenizer.is_special(id) {
            text
        } else {
            format!("{text:?}")
        };
        [id.to_string(), sanitise(&printed).into_owned()]
    });
    print(&table(&rows.collect::<Vec<_>>()))
}
