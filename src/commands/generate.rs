//! `distill generate`: answers one prompt, or runs a chat in the terminal.

use std::io::{IsTerminal, Read};

use anyhow::{Context, Result};
use serde_json::json;

use crate::cli::{GenerateArgs, GlobalArgs};
use crate::exit::Exit;
use crate::model::Model;
use crate::model::batcher::{Batcher, FinishReason, GenerateOptions};
use crate::model::sampling::SamplingParams;
use crate::prompt::message::Message;
use crate::terminal;
use crate::tokenizer::Tokenizer;

/// Answers the prompt of the command line, or runs a chat.
///
/// # Errors
/// If the arguments are invalid, the model cannot be loaded or the generation fails.
pub fn run(args: &GenerateArgs, global: &GlobalArgs) -> Result<()> {
    let is_valid_temperature = args.temperature.is_finite() && args.temperature >= 0.0;
    if !is_valid_temperature || !(0.0..=1.0).contains(&args.top_p) || args.max_tokens == 0 {
        let message = "--temperature must be finite and 0 or more, --top-p from 0 to 1, and --max-tokens greater than 0";
        return Err(Exit::Usage(message.into()).into());
    }
    let prompt = match args.prompt.as_deref() {
        Some("-") => Some(read_stdin()?),
        Some(prompt) => Some(prompt.to_string()),
        None if std::io::stdin().is_terminal() && !global.json => None,
        None => {
            return Err(Exit::Usage(
                "no prompt given: pass a prompt, or `-` to read it from stdin".into(),
            )
            .into());
        }
    };
    let model = Model::load(&args.model)?;
    let mut tokenizer = Tokenizer::load(&args.model)?;
    tokenizer.use_clock();
    tokenizer.check_fits(model.config().vocab_size)?;
    let chat = ChatSession {
        model,
        tokenizer,
        options: GenerateOptions {
            max_tokens: args.max_tokens,
            sampling: SamplingParams {
                temperature: args.temperature,
                top_p: args.top_p,
                seed: args.seed.unwrap_or_else(|| fastrand::u64(..)),
            },
            ..GenerateOptions::default()
        },
        prints_answers: !global.json,
    };
    let mut messages: Vec<Message> = Vec::new();
    messages.extend(
        args.system
            .as_deref()
            .map(|text| Message::new("system", text)),
    );
    match prompt {
        None => chat.interactive(messages),
        Some(prompt) => {
            messages.push(Message::new("user", prompt));
            match chat.answer(&messages)? {
                Some(answer) if global.json => super::print_json(&answer.json()),
                _ => Ok(()),
            }
        }
    }
}

fn read_stdin() -> Result<String> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("cannot read the prompt from stdin")?;
    // The prompt of `echo hello | distill generate -` is "hello", not "hello\n".
    Ok(text.trim_end_matches(['\r', '\n']).to_string())
}

/// A loaded model that answers messages.
struct ChatSession {
    model: Model,
    tokenizer: Tokenizer,
    options: GenerateOptions,
    /// True to print the answer while it is generated.
    prints_answers: bool,
}

struct ChatAnswer {
    text: String,
    finish_reason: FinishReason,
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl ChatAnswer {
    fn json(&self) -> serde_json::Value {
        json!({
            "version": 1,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            },
        })
    }
}

impl ChatSession {
    /// Generates the answer to the messages, and prints it if `prints_answers`. Stops and returns `None` if the reader
    /// of stdout has closed it.
    fn answer(&self, messages: &[Message]) -> Result<Option<ChatAnswer>> {
        let prompt = self.tokenizer.encode_prompt(messages)?;
        let mut answer = ChatAnswer {
            text: String::new(),
            finish_reason: FinishReason::Length,
            prompt_tokens: prompt.len(),
            completion_tokens: 0,
        };
        let mut batcher = Batcher::new(&self.model, &self.tokenizer, 1);
        batcher.submit(prompt, &self.options)?;
        while !batcher.is_idle() {
            for update in batcher.step()? {
                if !self.print(&update.text)? {
                    return Ok(None);
                }
                answer.text.push_str(&update.text);
                answer.completion_tokens += 1;
                answer.finish_reason = update.finish_reason.unwrap_or(answer.finish_reason);
            }
        }
        Ok(self.print("\n")?.then_some(answer))
    }

    /// Prints text if `prints_answers`, sanitised for a terminal. Returns false if the reader of stdout has closed it.
    fn print(&self, text: &str) -> Result<bool> {
        if !self.prints_answers {
            return Ok(true);
        }
        if std::io::stdout().is_terminal() {
            super::print_if_open(&terminal::sanitise(text))
        } else {
            super::print_if_open(text)
        }
    }

    /// Runs a chat in the terminal until the input ends.
    fn interactive(&self, mut messages: Vec<Message>) -> Result<()> {
        eprintln!("type a message and press Enter; Ctrl-D ends the chat");
        loop {
            eprint!("> ");
            let mut line = String::new();
            if std::io::stdin().read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                continue;
            }
            messages.push(Message::new("user", line.trim()));
            let Some(answer) = self.answer(&messages)? else {
                return Ok(());
            };
            messages.push(Message::new("assistant", answer.text));
        }
    }
}
