//! The environment of a chat template, in which every operation is charged for the bytes that it processes.

use std::sync::LazyLock;

use jiff::civil::DateTime;

use crate::tokenizer::chat_template::python_date;
use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, Expression, State, Value, context};
use minijinja_contrib::pycompat;

use crate::tokenizer::chat_template::{python_json, python_text};

/// Error of a template that calls `strftime_now` without a date.
pub const NEEDS_DATE: &str = "it calls `strftime_now`: set `student.template_date` to a date";
/// Maximum number of bytes that a rendering may process.
pub(crate) const ALLOWANCE: usize = 16 << 20;
/// Additional bytes for each byte of the messages.
const ALLOWANCE_PER_BYTE: usize = 200;
/// Maximum size of one value in bytes.
pub(crate) const MAX_VALUE_BYTES: usize = 64 << 10;
/// Additional size of one value for each byte of the messages.
const MAX_VALUE_PER_BYTE: usize = 4;
/// Charge for an element of a list, in bytes.
const ELEMENT: usize = 32;
/// Maximum number of elements of a `range`.
const MAX_RANGE: usize = 1_000;
/// Maximum length of a date format in bytes.
const MAX_DATE_FORMAT: usize = 100;
/// Maximum depth of nested macro calls and loops. Deeper templates could overflow the stack of a thread, because the
/// engine's stack frames are large.
const RECURSION: usize = 100;

/// Names of the functions that replace operators, and the expressions that they evaluate. A template cannot call them,
/// because their names are not valid identifiers.
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
/// Name of the global variable that holds the size of the messages in bytes. It is not a valid identifier either.
const INPUT_BYTES: &str = "size of the input";

/// Filters of the engine that a template may use.
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
/// Filters that are refused, because their results can have any size.
const REFUSED_FILTERS: &[&str] = &["batch", "format", "indent", "pprint", "slice", "sum"];
/// Tests of the engine that compare values.
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

/// Limits of a rendering.
struct CostMeter {
    /// Number of bytes that may still be processed.
    remaining: usize,
    /// Maximum size of one value in bytes.
    max_value: usize,
}

/// The engine's own environment, whose filters and tests are called after they are charged for.
static BUILTIN: LazyLock<Environment<'static>> = LazyLock::new(Environment::new);

/// Returns the environment that `transformers` provides to chat templates, with `date` instead of the clock.
/// `input_bytes` is the total size of the messages, which raises the limits.
pub(crate) fn environment(input_bytes: usize, date: Option<DateTime>) -> Environment<'static> {
    let mut env = METERED.clone();
    env.add_global(INPUT_BYTES, input_bytes);
    env.add_function("strftime_now", move |format: String| match date {
        None => Err(Error::new(ErrorKind::InvalidOperation, NEEDS_DATE)),
        Some(_) if format.len() > MAX_DATE_FORMAT => Err(refusal("its date format is too long")),
        Some(date) => python_date::format(&format, date),
    });
    env
}

/// The environment without the size of the messages and the date.
static METERED: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut env = Environment::new();
    env.set_debug(false);
    env.set_recursion_limit(RECURSION);
    env.set_formatter(|out, state, value| {
        charge(state, deep_size(value))?;
        minijinja::escape_formatter(out, state, value)
    });
    env.set_unknown_method_callback(|state, value, method, args| {
        charge(state, cost(method, value, args)?)?;
        let result = match python_text::call(value, method, args) {
            Some(result) => result?,
            None => pycompat::unknown_method_callback(state, value, method, args)?,
        };
        charge_result(state, result)
    });
    for (name, expression) in OPERATORS {
        let operator = BUILTIN.compile_expression(expression);
        env.add_function(*name, move |state: &mut State, args: Rest<Value>| {
            apply_operator(state, name, operator.as_ref(), &args)
        });
    }
    for name in FILTERS {
        env.add_filter(*name, move |state: &mut State, args: FilterArguments| {
            let args = into_values(args);
            let (value, options) = args.split_first().ok_or(ErrorKind::MissingArgument)?;
            charge(state, cost(name, value, options)?)?;
            let result = BUILTIN.empty_state().apply_filter(name, &args)?;
            charge_result(state, result)
        });
    }
    for name in TESTS {
        env.add_test(*name, move |state: &mut State, args: Rest<Value>| {
            charge(state, sum_sizes(&args, deep_size))?;
            BUILTIN.empty_state().perform_test(name, &args)
        });
    }
    // Tests with Python's semantics for strings, dictionaries, None and undefined values.
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
    env.add_filter("tojson", |state: &mut State, args: FilterArguments| {
        let args = into_values(args);
        charge(state, sum_sizes(&args, deep_size))?;
        let result = python_json::tojson(&args)?;
        charge_result(state, result)
    });
    env.remove_global("debug");
    for (name, function) in BUILTIN.globals() {
        let name: &'static str = match name {
            "range" => "range",
            "dict" => "dict",
            "namespace" => "namespace",
            _ => continue,
        };
        env.add_function(name, move |state: &mut State, args: FilterArguments| {
            let args = into_values(args);
            charge(state, sum_sizes(&args, shallow_size))?;
            let result = function.call(state, &args)?;
            if name == "range" && result.len().is_none_or(|items| items > MAX_RANGE) {
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

/// The positional arguments, and the keyword arguments as the last element.
type FilterArguments = Rest<ValueOrKwargs>;

fn into_values(arguments: FilterArguments) -> Vec<Value> {
    let Rest(arguments) = arguments;
    arguments
        .into_iter()
        .map(ValueOrKwargs::into_value)
        .collect()
}

/// Applies an operator, and charges for its operands and its result.
fn apply_operator(
    state: &mut State,
    name: &str,
    operator: Result<&Expression, &Error>,
    operands: &[Value],
) -> Result<Value, Error> {
    let operand = |index: usize| operands.get(index).cloned().unwrap_or_default();
    let a = operand(0);
    let b = operand(1);
    let cost = match name {
        "operator +" | "operator []" => sum_sizes(operands, shallow_size),
        "operator *" => {
            let times = a.as_usize().or(b.as_usize()).unwrap_or(1);
            sum_sizes(operands, shallow_size).saturating_mul(times)
        }
        _ => sum_sizes(operands, deep_size),
    };
    charge(state, cost)?;
    let operator = operator.map_err(|e| Error::new(e.kind(), "an operator does not compile"))?;
    let result = operator.eval(context! { a, b, c => operand(2), d => operand(3) })?;
    charge_result(state, result)
}

/// Returns the cost of a filter or a method in bytes: the size of the data that it reads, plus the size of its result
/// if the result can be much larger.
fn cost(name: &str, value: &Value, options: &[Value]) -> Result<usize, Error> {
    let read_bytes = match name {
        "count" | "d" | "default" | "first" | "items" | "keys" | "last" | "length" | "list"
        | "get" | "reverse" | "values" => shallow_size(value),
        _ => deep_size(value),
    };
    let text = |index: usize| {
        options
            .get(index)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    match name {
        "replace" => {
            let matches = value.as_str().unwrap_or_default().matches(text(0)).count();
            Ok(read_bytes.saturating_add(matches.saturating_mul(text(1).len())))
        }
        // The method is called on the separator, the filter on the list.
        "join" if value.as_str().is_some() => {
            let list_bytes = options.first().map_or(0, deep_size);
            Ok(list_bytes.saturating_add((list_bytes / ELEMENT).saturating_mul(read_bytes)))
        }
        "join" => {
            let separators = (read_bytes / ELEMENT).saturating_mul(text(0).len());
            Ok(read_bytes.saturating_add(separators))
        }
        // An estimate, for parts of four bytes. `charge_result` charges for the real number of parts.
        "split" | "splitlines" | "lines" => Ok(read_bytes.saturating_mul(ELEMENT) / 4),
        "format" => Err(refusal("it calls `format`")),
        "map" => match text(0) {
            "" | "int" | "length" | "list" | "lower" | "string" | "title" | "trim" | "upper" => {
                Ok(read_bytes)
            }
            other => Err(refusal(&format!("it maps the filter `{other}`"))),
        },
        _ => Ok(read_bytes),
    }
}

/// Charges `bytes` to the allowance of the rendering.
fn charge(state: &mut State, bytes: usize) -> Result<(), Error> {
    let input_bytes = state
        .lookup(INPUT_BYTES)
        .and_then(|v| v.as_usize())
        .unwrap_or(0);
    let meter = state.get_or_insert_extension_with(|| CostMeter {
        remaining: ALLOWANCE + ALLOWANCE_PER_BYTE * input_bytes,
        max_value: MAX_VALUE_BYTES + MAX_VALUE_PER_BYTE * input_bytes,
    });
    match meter.remaining.checked_sub(bytes) {
        Some(remaining) => meter.remaining = remaining,
        None => return Err(refusal("it handles too much data")),
    }
    Ok(())
}

/// Charges for the result of an operation and checks its size.
fn charge_result(state: &mut State, value: Value) -> Result<Value, Error> {
    let size = shallow_size(&value);
    charge(state, size)?;
    match state.get_extension::<CostMeter>() {
        Some(meter) if size > meter.max_value => Err(refusal("it makes too large a value")),
        _ => Ok(value),
    }
}

fn sum_sizes(values: &[Value], size: fn(&Value) -> usize) -> usize {
    values.iter().map(size).fold(0, usize::saturating_add)
}

/// Returns the size of a value in bytes, without the contents of a list's elements.
fn shallow_size(value: &Value) -> usize {
    match value.kind() {
        ValueKind::String | ValueKind::Bytes => value.len().unwrap_or(0),
        _ => ELEMENT.saturating_mul(value.len().unwrap_or(1).max(1)),
    }
}

/// Returns the size of a value in bytes, with all its contents, or `usize::MAX` if its elements exceed [`ALLOWANCE`] or
/// are nested deeper than [`RECURSION`].
fn deep_size(value: &Value) -> usize {
    fn add(value: &Value, total: &mut usize, depth: usize) {
        *total = total.saturating_add(match value.as_str() {
            Some(text) => text.len(),
            None => ELEMENT,
        });
        let is_container = matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::Map | ValueKind::Iterable
        );
        let (true, Ok(elements)) = (is_container, value.try_iter()) else {
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

/// Returns the error of a template that does something forbidden. `action` is a clause that begins with `it` and names
/// the forbidden action.
pub(crate) fn refusal(action: &str) -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("{action}, which is not allowed in a chat template"),
    )
}
