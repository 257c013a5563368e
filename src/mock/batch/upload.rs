//! Parses the `multipart/form-data` body of a file upload. Pure.

use memchr::memmem::find;

/// An uploaded file and its purpose.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Upload<'a> {
    pub purpose: String,
    pub filename: String,
    pub content: &'a [u8],
}

/// Parses an upload. The content is not copied, because `body` may have hundreds of megabytes.
///
/// # Errors
/// A message that says what is missing.
pub(crate) fn parse<'a>(content_type: &str, body: &'a [u8]) -> Result<Upload<'a>, &'static str> {
    let boundary = content_type
        .split(';')
        .filter_map(|part| part.trim().strip_prefix("boundary="))
        .map(|boundary| boundary.trim_matches('"'))
        .next()
        .filter(|boundary| !boundary.is_empty() && content_type.starts_with("multipart/form-data"))
        .ok_or("expected multipart/form-data with a boundary")?;
    let delimiter = format!("\r\n--{boundary}");
    let mut purpose = None;
    let mut file = None;
    // No line break precedes the first delimiter.
    let mut remaining = body
        .strip_prefix(&delimiter.as_bytes()[2..])
        .ok_or("the body does not start with the boundary")?;
    while let Some(part) = remaining.strip_prefix(b"\r\n") {
        let end = find(part, delimiter.as_bytes()).ok_or("the last boundary is missing")?;
        let (head, content) = match find(&part[..end], b"\r\n\r\n") {
            Some(blank) => (&part[..blank], &part[blank + 4..end]),
            None => return Err("a part has no headers"),
        };
        let head = String::from_utf8_lossy(head);
        match attribute(&head, "name") {
            Some("purpose") => purpose = Some(String::from_utf8_lossy(content).into_owned()),
            Some("file") => {
                let name = attribute(&head, "filename").unwrap_or("upload");
                file = Some((name.to_string(), content));
            }
            _ => {}
        }
        remaining = &part[end + delimiter.len()..];
    }
    let (filename, content) = file.ok_or("the part `file` is missing")?;
    Ok(Upload {
        purpose: purpose.ok_or("the part `purpose` is missing")?,
        filename,
        content,
    })
}

/// Returns the value of `name="..."` in a part's headers.
fn attribute<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let prefix = format!(" {name}=\"");
    let (_, value) = head.split_once(&prefix)?;
    value.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPE: &str = "multipart/form-data; boundary=\"xx\"";

    #[test]
    fn parts_are_found_whatever_the_file_contains() {
        let content = "{\"a\":1}\r\n--x\r\n\r\n{}\n";
        let body = format!(
            "--xx\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
             --xx\r\ncontent-disposition: form-data; name=\"file\"; filename=\"b.jsonl\"\r\n\
             content-type: application/jsonl\r\n\r\n{content}\r\n--xx--\r\n"
        );
        let expected = Upload {
            purpose: "batch".into(),
            filename: "b.jsonl".into(),
            content: content.as_bytes(),
        };
        assert_eq!(parse(TYPE, body.as_bytes()), Ok(expected));
    }

    #[test]
    fn error_says_what_is_missing() {
        for (content_type, body, part) in [
            ("application/json", "{}", "multipart/form-data"),
            (TYPE, "{}", "boundary"),
            (TYPE, "--xx--\r\n", "`file`"),
            (TYPE, "--xx\r\nx: y\r\n\r\nz", "last boundary"),
            (TYPE, "--xx\r\nx: y\r\n--xx--", "no headers"),
            (
                TYPE,
                "--xx\r\nx; name=\"file\"\r\n\r\nz\r\n--xx--\r\n",
                "`purpose`",
            ),
        ] {
            let error = parse(content_type, body.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
