//! Runs an untrusted chat template with limits on work and memory.
//!
//! A template is a part of a model, which may come from anyone. The engine's own limit ("fuel") counts instructions,
//! but one instruction can double a string (thirty of them make a gigabyte), copy it or compare it. Therefore each
//! rendering has one allowance of bytes. All output, and the data that operators, filters, tests and methods read and
//! produce, are charged to it by size ([`meter`]).
//!
//! The engine does not let a program intercept operators, so they are replaced by function calls in the compiled
//! template.

use std::sync::Arc;

use jiff::civil::DateTime;
use minijinja::machinery::{self, CompiledTemplate, Instruction, TemplateConfig, Token};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Error, Value};

use crate::tokenizer::chat_template::meter;
use crate::tokenizer::chat_template::meter::{ALLOWANCE, MAX_VALUE_BYTES, refusal};

/// Maximum number of instructions of a rendering.
const FUEL: usize = 100_000;
/// Additional instructions for each message.
const FUEL_PER_MESSAGE: usize = 2_000;
/// Maximum size of a template in bytes.
const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Maximum number of tokens of the template language in one tag. The compiler recurses over these tokens.
const MAX_TAG_TOKENS: usize = 1_000;
/// Maximum number of `elif` branches in the whole template. The compiler recurses over these branches.
const MAX_BRANCHES: usize = 500;

/// Renders `source`. `message_count` is the number of messages in the context and `input_bytes` their size; both raise
/// the limits. `strftime_now` formats `date`.
pub(crate) fn render(
    source: &str,
    context: Value,
    message_count: usize,
    input_bytes: usize,
    date: Option<DateTime>,
) -> Result<String, Error> {
    let syntax_config = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    check_source(source, &syntax_config)?;
    let config = TemplateConfig {
        syntax_config,
        default_auto_escape: Arc::new(|_| AutoEscape::None),
    };
    let mut template = CompiledTemplate::new("chat template", source, &config)?;
    let mut longest_text = 1;
    let blocks = template.blocks.values_mut();
    for instructions in std::iter::once(&mut template.instructions).chain(blocks) {
        let mut index = 0;
        while let Some(instruction) = instructions.get_mut(index) {
            longest_text = longest_text.max(replace_operator(instruction)?);
            index += 1;
        }
    }

    let mut env = meter::environment(input_bytes, date);
    // The meter does not charge for the template's own text, so the fuel limits how often it is written.
    let fuel = FUEL.min(ALLOWANCE / longest_text) + message_count * FUEL_PER_MESSAGE;
    env.set_fuel(Some(fuel as u64));
    let mut rendered = String::new();
    machinery::eval(
        &env,
        &template.instructions,
        context,
        &template.blocks,
        &mut machinery::make_string_output(&mut rendered),
        AutoEscape::None,
    )?;
    Ok(rendered)
}

/// Replaces an instruction that applies an operator by a call of the charged function with the same operands and
/// result. Returns the length of the template text that the instruction writes: 0 for all instructions except
/// `EmitRaw`.
fn replace_operator(instruction: &mut Instruction) -> Result<usize, Error> {
    let (function, operands) = match instruction {
        Instruction::Add => ("operator +", 2),
        Instruction::Mul => ("operator *", 2),
        Instruction::StringConcat => ("operator ~", 2),
        Instruction::Slice => ("operator []", 4),
        Instruction::Eq => ("operator ==", 2),
        Instruction::Ne => ("operator !=", 2),
        Instruction::Lt => ("operator <", 2),
        Instruction::Lte => ("operator <=", 2),
        Instruction::Gt => ("operator >", 2),
        Instruction::Gte => ("operator >=", 2),
        Instruction::In => ("operator in", 2),
        Instruction::UnpackLists(_) => return Err(refusal("it unpacks a list with `*`")),
        Instruction::CompareAndPreserve(_) => return Err(refusal("it chains comparisons")),
        Instruction::EmitRaw(text) => return Ok(text.len()),
        _ => return Ok(0),
    };
    *instruction = Instruction::CallFunction(function, Some(operands));
    Ok(0)
}

/// Refuses templates that would exhaust the compiler's stack or memory. The compiler recurses over nested expressions,
/// and it evaluates constant expressions: in a tag with a multiplication, the product of all constants bounds the size
/// of their results.
fn check_source(source: &str, syntax: &SyntaxConfig) -> Result<(), Error> {
    if source.len() > MAX_TEMPLATE_BYTES {
        return Err(refusal("it is too long"));
    }
    let mut tokens = 0;
    let mut has_product = false;
    let mut text_bytes = 0usize;
    let mut product = 1usize;
    let mut branches = 0;
    for token in machinery::tokenize(source, false, syntax.clone()) {
        tokens += 1;
        match token?.0 {
            Token::VariableStart | Token::BlockStart => {
                tokens = 0;
                has_product = false;
                text_bytes = 0;
                product = 1;
            }
            Token::Str(part) => text_bytes += part.len(),
            Token::String(part) => text_bytes += part.len(),
            Token::Int(number) => {
                let number = usize::try_from(number).unwrap_or(usize::MAX).max(2);
                product = product.saturating_mul(number);
            }
            Token::Int128(_) | Token::Float(_) => product = usize::MAX,
            Token::Ident("elif") => branches += 1,
            Token::Mul => has_product = true,
            Token::Pow => {
                has_product = true;
                product = usize::MAX;
            }
            _ => {}
        }
        if tokens > MAX_TAG_TOKENS || branches > MAX_BRANCHES {
            return Err(refusal(
                "it has too many parts in one tag, or too many `elif`s",
            ));
        }
        if has_product && product.saturating_mul(text_bytes.max(1)) > MAX_VALUE_BYTES {
            return Err(refusal("it multiplies large constants"));
        }
    }
    Ok(())
}
