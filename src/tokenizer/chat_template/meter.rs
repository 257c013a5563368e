//! The environment in which a chat template runs, where all that handles data pays for it.

use std::sync::LazyLock;

use jiff::civil::DateTime;

use crate::tokenizer::chat_template::python_date;
use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, Expression, State, Value, context};
use minijinja_contrib::pycompat;

use crate::tokenizer::chat_template::{python_json, python_text};

/// Error of a template that calls `strftime_now` without a date.
pub const NEEDS_DATE: &str = "it calls `strftime_now`: set `student.template_date` to a date";
/// Bytes that a rendering may handle, and how often it may handle each byte of the messages.
pub(crate) const ALLOWANCE: usize = 16 << 20;
const ALLOWANCE_PER_BYTE: usize = 200;
/// Bytes in one value, and for each byte of the messages.
pub(crate) const LARGEST_VALUE: usize = 64 << 10;
const LARGEST_VALUE_PER_BYTE: usize = 4;
/// What an element of a list counts for.
const ELEMENT: usize = 32;
const LARGEST_RANGE: usize = 1_000;
const LONGEST_FORMAT: usize = 100;
/// Nested macro calls and loops; low, since a frame of the engine is large and threads are small.
const RECURSION: usize = 100;

/// The functions that stand in for operators, and what they compute. A template cannot call them,
/// since their names are no names of the language.
const OPERATORS: &[(&str, &str)] = &[
    ("operator +", "a + b"),
    ("operator *", "a * b"),
    ("operator ~", "a ~ b"),
    ("operator []", "a[b:c:d]"),
    ("operator ==", "a == b"),
    ("operator !=", "a != b"),
    ("operator <", "a < b"),
    ("operator <=", "a <= b"),
    ("operator >", "a > b"),
    ("operator >=", "a >= b"),
    ("operator in", "a in b"),
];
/// The name under which the size of the messages is known here; no name of the language.
const INPUT: &str = "size of the input";

const FILTERS: &[&str] = &[
    "capitalize",
    "chain",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "groupby",
    "int",
    "items",
    "join",
    "last",
    "length",
    "lines",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "safe",
    "select",
    "selectattr",
    "sort",
    "split",
    "string",
    "title",
    "trim",
    "unique",
    "upper",
    "zip",
];
/// Their results can be of any size, whatever they are given.
const REFUSED_FILTERS: &[&str] = &["batch", "format", "indent", "pprint", "slice", "sum"];
const TESTS: &[&str] = &[
    "eq",
    "equalto",
    "==",
    "ne",
    "!=",
    "lt",
    "lessthan",
    "<",
    "le",
    "<=",
    "gt",
    "greaterthan",
    ">",
    "ge",
    ">=",
    "in",
];

/// What a rendering may still handle.
struct CostMeter {
    left: usize,
    largest: usize,
}

static BUILTIN: LazyLock<Environment<'static>> = LazyLock::new(Environment::new);

/// The environment that `transformers` provides to chat templates, with `date` instead of the clock, for
/// messages of `input` bytes in total.
pub(crate) fn environment(input: usize, date: Option<DateTime>) -> Environment<'static> {
    let mut env = METERED.clone();
    env.add_global(INPUT, input);
    env.add_function("strftime_now", move |format: String| match date {
        None => Err(Error::new(ErrorKind::InvalidOperation, NEEDS_DATE)),
        Some(_) if format.len() > LONGEST_FORMAT => Err(refusal("its date format is too long")),
        Some(date) => python_date::format(&format, date),
    });
    env
}

static METERED: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut env = Environment::new();
    env.set_debug(false);
    env.set_recursion_limit(RECURSION);
    env.set_formatter(|out, state, value| {
        charge(state, deep(value))?;
        minijinja::escape_formatter(out, state, value)
    });
    env.set_unknown_method_callback(|state, value, method, args| {
        charge(state, cost(method, value, args)?)?;
        let result = match python_text::call(value, method, args) {
            Some(result) => result?,
            None => pycompat::unknown_method_callback(state, value, method, args)?,
        };
        receive(state, result)
    });
    for (name, expression) in OPERATORS {
        let operator = BUILTIN.compile_expression(expression);
        env.add_function(*name, move |state: &mut State, args: Rest<Value>| {
            operate(state, name, operator.as_ref(), &args)
        });
    }
    for name in FILTERS {
        env.add_filter(*name, move |state: &mut State, args: Arguments| {
            let args = values(args);
            let (value, options) = args.split_first().ok_or(ErrorKind::MissingArgument)?;
            charge(state, cost(name, value, options)?)?;
            let result = BUILTIN.empty_state().apply_filter(name, &args)?;
            receive(state, result)
        });
    }
    for name in TESTS {
        env.add_test(*name, move |state: &mut State, args: Rest<Value>| {
            charge(state, total(&args, deep))?;
            BUILTIN.empty_state().perform_test(name, &args)
        });
    }
    // Python's semantics for strings, dictionaries, None and undefined values.
    env.add_test("iterable", |value: &Value| {
        value.is_undefined() || (!value.is_none() && value.try_iter().is_ok())
    });
    env.add_test("sequence", |value: &Value| {
        let kind = value.kind();
        matches!(
            kind,
            ValueKind::String | ValueKind::Map | ValueKind::Seq | ValueKind::Undefined
        )
    });
    for name in REFUSED_FILTERS {
        env.remove_filter(name);
    }
    env.add_filter("tojson", |state: &mut State, args: Arguments| {
        let args = values(args);
        charge(state, total(&args, deep))?;
        let result = python_json::tojson(&args)?;
        receive(state, result)
    });
    env.remove_global("debug");
    for (name, function) in BUILTIN.globals() {
        let name: &'static str = match name {
            "range" => "range",
            "dict" => "dict",
            "namespace" => "namespace",
            _ => continue,
        };
        env.add_function(name, move |state: &mut State, args: Arguments| {
            let args = values(args);
            charge(state, total(&args, shallow))?;
            let result = function.call(state, &args)?;
            if name == "range" && result.len().is_none_or(|items| items > LARGEST_RANGE) {
                return Err(refusal("it asks for too long a range"));
            }
            Ok(result)
        });
    }
    env.add_function("raise_exception", |message: String| {
        Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message))
    });
    env
});

/// Positional arguments, and keyword arguments as the last.
type Arguments = Rest<ValueOrKwargs>;

fn values(arguments: Arguments) -> Vec<Value> {
    let Rest(arguments) = arguments;
    arguments
        .into_iter()
        .map(ValueOrKwargs::into_value)
        .collect()
}

fn operate(
    state: &mut State,
    name: &str,
    operator: Result<&Expression, &Error>,
    operands: &[Value],
) -> Result<Value, Error> {
    let operand = |at: usize| operands.get(at).cloned().unwrap_or_default();
    let (a, b) = (operand(0), operand(1));
    let before = match name {
        "operator +" | "operator []" => total(operands, shallow),
        "operator *" => {
            let times = a.as_usize().or(b.as_usize()).unwrap_or(1);
            total(operands, shallow).saturating_mul(times)
        }
        _ => total(operands, deep),
    };
    charge(state, before)?;
    let operator = operator.map_err(|e| Error::new(e.kind(), "an operator does not compile"))?;
    let result = operator.eval(context! { a, b, c => operand(2), d => operand(3) })?;
    receive(state, result)
}

/// What a filter or a method reads, and what it makes where that can be far more.
fn cost(name: &str, value: &Value, options: &[Value]) -> Result<usize, Error> {
    let read = match name {
        "count" | "d" | "default" | "first" | "items" | "keys" | "last" | "length" | "list"
        | "get" | "reverse" | "values" => shallow(value),
        _ => deep(value),
    };
    let text = |at: usize| options.get(at).and_then(Value::as_str).unwrap_or_default();
    match name {
        "replace" => {
            let found = value.as_str().unwrap_or_default().matches(text(0)).count();
            Ok(read.saturating_add(found.saturating_mul(text(1).len())))
        }
        // the method belongs to the separator, the filter to the list
        "join" if value.as_str().is_some() => {
            let list = options.first().map_or(0, deep);
            Ok(list.saturating_add((list / ELEMENT).saturating_mul(read)))
        }
        "join" => Ok(read.saturating_add((read / ELEMENT).saturating_mul(text(0).len()))),
        "split" | "splitlines" | "lines" => Ok(read.saturating_mul(ELEMENT) / 4),
        "format" => Err(refusal("it calls `format`")),
        "map" => match text(0) {
            "" | "int" | "length" | "list" | "lower" | "string" | "title" | "trim" | "upper" => {
                Ok(read)
            }
            other => Err(refusal(&format!("it maps the filter `{other}`"))),
        },
        _ => Ok(read),
    }
}

/// Takes `bytes` from what is left.
fn charge(state: &mut State, bytes: usize) -> Result<(), Error> {
    let input = state.lookup(INPUT).and_then(|v| v.as_usize()).unwrap_or(0);
    let meter = state.get_or_insert_extension_with(|| CostMeter {
        left: ALLOWANCE + ALLOWANCE_PER_BYTE * input,
        largest: LARGEST_VALUE + LARGEST_VALUE_PER_BYTE * input,
    });
    match meter.left.checked_sub(bytes) {
        Some(left) => meter.left = left,
        None => return Err(refusal("it handles too much data")),
    }
    Ok(())
}

/// Pays for a value that has just been made.
fn receive(state: &mut State, value: Value) -> Result<Value, Error> {
    let size = shallow(&value);
    charge(state, size)?;
    match state.get_extension::<CostMeter>() {
        Some(meter) if size > meter.largest => Err(refusal("it makes too large a value")),
        _ => Ok(value),
    }
}

fn total(values: &[Value], size: fn(&Value) -> usize) -> usize {
    values.iter().map(size).fold(0, usize::saturating_add)
}

/// The size of a value without that of a list's elements.
fn shallow(value: &Value) -> usize {
    match value.kind() {
        ValueKind::String | ValueKind::Bytes => value.len().unwrap_or(0),
        _ => ELEMENT.saturating_mul(value.len().unwrap_or(1).max(1)),
    }
}

/// The size of a value with all that it holds; no more than is needed to exceed any allowance.
fn deep(value: &Value) -> usize {
    fn add(value: &Value, total: &mut usize, depth: usize) {
        *total = total.saturating_add(match value.as_str() {
            Some(text) => text.len(),
            None => ELEMENT,
        });
        let nested = matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::Map | ValueKind::Iterable
        );
        let (true, Ok(elements)) = (nested, value.try_iter()) else {
            return;
        };
        for element in elements {
            if *total > ALLOWANCE || depth > RECURSION {
                *total = usize::MAX;
                return;
            }
            add(&element, total, depth + 1);
            if value.kind() == ValueKind::Map
                && let Ok(inner) = value.get_item(&element)
            {
                add(&inner, total, depth + 1);
            }
        }
    }
    let mut total = 0;
    add(value, &mut total, 0);
    total
}

pub(crate) fn refusal(what: &str) -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("{what}, which is more than a chat template may do"),
    )
}
