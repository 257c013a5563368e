//! The batch API of the mock from upload to results, on the paused clock.

use std::collections::BTreeMap;
use std::time::Duration;

use distill::mock::Mock;
use distill::mock::request::MockRequest;
use distill::mock::response::{MockReply, MockResponse};
use serde_json::{Value, json};
use tokio::time::advance;

use super::{body, json_of, mock, text};

const ENDPOINT: &str = "/v1/chat/completions";

/// Returns a request to a file or batch route. The multipart boundary is `b`.
pub fn batch_request<'a>(method: &'a str, path: &'a str, body: &'a [u8]) -> MockRequest<'a> {
    let content_type = match path {
        "/v1/files" => "multipart/form-data; boundary=b",
        _ => "application/json",
    };
    MockRequest {
        method,
        path,
        content_type: Some(content_type),
        body,
        ..MockRequest::default()
    }
}

async fn send(mock: &Mock, method: &str, path: &str, body: &[u8]) -> MockResponse {
    mock.respond(batch_request(method, path, body)).await
}

/// Sends a request. Returns its reply, which must be complete.
async fn call(mock: &Mock, method: &str, path: &str, body: &[u8]) -> MockReply {
    match send(mock, method, path, body).await {
        MockResponse::Complete(reply) => reply,
        other => panic!("{other:?}"),
    }
}

async fn get(mock: &Mock, path: &str) -> Value {
    let reply = call(mock, "GET", path, b"").await;
    assert_eq!(reply.status, 200, "{path}");
    json_of(&reply)
}

/// Uploads a file. Returns its id.
async fn upload(mock: &Mock, content: &str) -> String {
    let form = format!(
        "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
         --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n\
         {content}\r\n--b--\r\n"
    );
    let reply = call(mock, "POST", "/v1/files", form.as_bytes()).await;
    assert_eq!(reply.status, 200);
    let file = json_of(&reply);
    assert_eq!(file["bytes"], content.len());
    assert_eq!(file["purpose"], "batch");
    file["id"].as_str().unwrap().to_string()
}

/// Returns the body of a request that creates a batch.
fn create_body(file: &str) -> Vec<u8> {
    json!({
        "input_file_id": file, "endpoint": ENDPOINT, "completion_window": "24h",
        "metadata": {"nonce": "n1"},
    })
    .to_string()
    .into_bytes()
}

/// Returns input lines with the ids `r0`, `r1`, ... and the prompts `row 0`, `row 1`, ...
fn rows(count: usize) -> String {
    (0..count)
        .map(|index| {
            let body: Value =
                serde_json::from_slice(&body(&format!("row {index}"), json!({}))).unwrap();
            let row = json!({
                "custom_id": format!("r{index}"), "method": "POST", "url": ENDPOINT, "body": body,
            });
            format!("{row}\n")
        })
        .collect()
}

/// Creates a batch of these lines. Returns the batch and its path.
async fn create(mock: &Mock, lines: &str) -> (Value, String) {
    let file = upload(mock, lines).await;
    let reply = call(mock, "POST", "/v1/batches", &create_body(&file)).await;
    assert_eq!(reply.status, 200, "{:?}", reply.body);
    let batch = json_of(&reply);
    let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
    (batch, path)
}

async fn advance_seconds(seconds: u64) {
    advance(Duration::from_secs(seconds)).await;
}

/// Returns the lines of a results file by `custom_id`, or none if the id of the file is null.
async fn lines(mock: &Mock, file: &Value) -> BTreeMap<String, Value> {
    let Some(id) = file.as_str() else {
        return BTreeMap::new();
    };
    let reply = call(mock, "GET", &format!("/v1/files/{id}/content"), b"").await;
    let content = std::str::from_utf8(&reply.body).unwrap();
    assert!(content.ends_with('\n'));
    let rows = content.lines().map(|line| {
        let row: Value = serde_json::from_str(line).unwrap();
        (row["custom_id"].as_str().unwrap().to_string(), row)
    });
    let rows: BTreeMap<String, Value> = rows.collect();
    assert_eq!(
        rows.len(),
        content.lines().count(),
        "a custom_id is repeated"
    );
    rows
}

#[tokio::test(start_paused = true)]
async fn batch_completes_and_is_billed_once() {
    let mock = mock("[answers]\ntext = \"upper\"\n[batch]\nclock = 10\nin_progress_s = 100");
    let (batch, path) = create(&mock, &rows(10)).await;
    assert_eq!(batch["status"], "validating");
    assert_eq!(batch["metadata"]["nonce"], "n1");
    assert_eq!(
        batch["request_counts"],
        json!({"total": 0, "completed": 0, "failed": 0})
    );
    // The status changes 60, 160 and 220 seconds after the creation on the clock of the mock, which is ten times as
    // fast.
    advance_seconds(11).await;
    let batch = get(&mock, &path).await;
    assert_eq!(batch["status"], "in_progress");
    assert_eq!(
        batch["request_counts"],
        json!({"total": 10, "completed": 5, "failed": 0})
    );
    assert_eq!(batch["output_file_id"], Value::Null);
    assert_eq!(mock.stats().billed.answers, 0);
    advance_seconds(5).await;
    assert_eq!(get(&mock, &path).await["status"], "finalizing");
    advance_seconds(6).await;
    let batch = get(&mock, &path).await;
    assert_eq!(batch["status"], "completed");
    assert_eq!(batch["errors"], Value::Null);
    assert_eq!(batch["error_file_id"], Value::Null);
    assert_eq!(
        batch["request_counts"],
        json!({"total": 10, "completed": 10, "failed": 0})
    );
    let stamp = |name: &str| batch[name].as_i64().unwrap() - batch["created_at"].as_i64().unwrap();
    assert_eq!(
        [
            "in_progress_at",
            "finalizing_at",
            "completed_at",
            "expires_at"
        ]
        .map(stamp),
        [60, 160, 220, 86_400]
    );
    let output = lines(&mock, &batch["output_file_id"]).await;
    assert_eq!(output.len(), 10);
    for (id, row) in &output {
        assert_eq!(row["response"]["status_code"], 200);
        assert_eq!(text(&row["response"]["body"]), format!("ROW {}", &id[1..]));
    }
    let billed = mock.stats().billed;
    assert_eq!((billed.answers, billed.batch_answers), (10, 10));
    assert_eq!(mock.times_billed(&body("row 3", json!({}))), 1);
}

#[tokio::test(start_paused = true)]
async fn error_rows_have_three_formats_and_lost_rows_are_in_no_file() {
    let mock = mock("[batch]\nerror_rows = 6\nlost_rows = 2\nrequest_counts = \"all_completed\"");
    let (_, path) = create(&mock, &rows(20)).await;
    advance_seconds(10_000).await;
    let batch = get(&mock, &path).await;
    // The script reports all rows as completed.
    assert_eq!(
        batch["request_counts"],
        json!({"total": 20, "completed": 20, "failed": 0})
    );
    let output = lines(&mock, &batch["output_file_id"]).await;
    let errors = lines(&mock, &batch["error_file_id"]).await;
    assert_eq!((output.len(), errors.len()), (12, 6));
    assert!(output.keys().all(|id| !errors.contains_key(id)));
    let formats =
        errors.values().map(
            |row| match (&row["response"]["status_code"], &row["error"]["code"]) {
                (Value::Null, Value::String(code)) if row["response"].is_null() => code.clone(),
                (status, Value::Null) => status.to_string(),
                other => panic!("{other:?}"),
            },
        );
    let mut formats: Vec<String> = formats.collect();
    formats.sort();
    assert_eq!(
        formats,
        ["0", "0", "500", "500", "server_error", "server_error"]
    );
    assert_eq!(mock.stats().billed.answers, 12);
    // The order differs from the order of the input.
    let output = batch["output_file_id"].as_str().unwrap();
    let content = call(&mock, "GET", &format!("/v1/files/{output}/content"), b"")
        .await
        .body;
    let order: Vec<usize> = std::str::from_utf8(&content)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|row| row["custom_id"].as_str().unwrap()[1..].parse().unwrap())
        .collect();
    assert!(!order.is_sorted(), "{order:?}");
}

#[tokio::test(start_paused = true)]
async fn batch_without_successful_row_has_no_output_file() {
    let mock = mock("[batch]\nerror_rows = 9");
    let (_, path) = create(&mock, &rows(3)).await;
    advance_seconds(10_000).await;
    let batch = get(&mock, &path).await;
    assert_eq!(
        (&batch["status"], &batch["output_file_id"]),
        (&json!("completed"), &Value::Null)
    );
    assert_eq!(lines(&mock, &batch["error_file_id"]).await.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn faults_and_rejections_apply_to_batch_rows() {
    let mock = mock(
        "[answers]\nrefuse_parameters = [\"seed\"]\n\
         [[faults]]\nkind = \"http 400\"\nmatching = \"row 1\"\n\
         [[faults]]\nkind = \"no usage\"\nmatching = \"row 2\"\n\
         [[faults]]\nkind = \"reset\"\nmatching = \"row 3\"",
    );
    let input = rows(4).replacen("\"model\"", "\"seed\":1,\"model\"", 1);
    let (_, path) = create(&mock, &input).await;
    advance_seconds(10_000).await;
    let batch = get(&mock, &path).await;
    let output = lines(&mock, &batch["output_file_id"]).await;
    assert_eq!(output.keys().collect::<Vec<_>>(), ["r2"]);
    assert_eq!(output["r2"]["response"]["body"]["usage"], Value::Null);
    let errors = lines(&mock, &batch["error_file_id"]).await;
    let status = |id: &str| errors[id]["response"]["status_code"].clone();
    assert_eq!(["r0", "r1", "r3"].map(status), [400, 400, 500]);
    assert_eq!(
        batch["request_counts"],
        json!({"total": 4, "completed": 1, "failed": 3})
    );
    assert_eq!(mock.stats().billed.answers, 1);
}

#[tokio::test(start_paused = true)]
async fn invalid_input_file_fails_with_line_numbers() {
    let mock = mock("[batch]\nmax_rows = 3");
    let row = rows(1).trim_end().to_string();
    let row_without = |name: &str| {
        let mut row: Value = serde_json::from_str(&row).unwrap();
        row.as_object_mut().unwrap().remove(name);
        row.to_string()
    };
    for (input, code, line) in [
        (String::new(), "empty_file", json!(null)),
        (format!("{row}\n{{\"cut\": "), "invalid_json_line", json!(2)),
        (format!("\n{row}\n{row}"), "duplicate_custom_id", json!(3)),
        (
            row_without("custom_id"),
            "missing_required_parameter",
            json!(1),
        ),
        (row_without("body"), "missing_required_parameter", json!(1)),
        (row.replace("POST", "GET"), "invalid_method", json!(1)),
        (
            row.replace("/v1/chat", "/v1/other"),
            "invalid_url",
            json!(1),
        ),
        (
            row.replace("\"mock\"", "\"gpt\""),
            "model_not_found",
            json!(1),
        ),
        (rows(4), "too_many_requests", json!(null)),
    ] {
        let (_, path) = create(&mock, &input).await;
        advance_seconds(59).await;
        assert_eq!(get(&mock, &path).await["status"], "validating");
        advance_seconds(1).await;
        let batch = get(&mock, &path).await;
        assert_eq!(batch["status"], "failed");
        let error = &batch["errors"]["data"][0];
        assert_eq!(
            (&error["code"], &error["line"]),
            (&json!(code), &line),
            "{error}"
        );
        assert!(batch["failed_at"].is_i64());
        assert_eq!(
            (&batch["output_file_id"], &batch["error_file_id"]),
            (&Value::Null, &Value::Null)
        );
    }
    assert_eq!(mock.stats().billed.answers, 0);
}

#[tokio::test(start_paused = true)]
async fn expired_and_cancelled_batches_have_partial_results() {
    for (outcome, code) in [
        ("expired", "batch_expired"),
        ("cancelled", "batch_cancelled"),
    ] {
        let mock = mock(&format!("[batch]\noutcome = \"{outcome}\""));
        let (_, path) = create(&mock, &rows(10)).await;
        advance_seconds(90_000).await;
        let batch = get(&mock, &path).await;
        assert_eq!(batch["status"], outcome);
        assert!(batch[format!("{outcome}_at")].is_i64(), "{batch}");
        assert_eq!(lines(&mock, &batch["output_file_id"]).await.len(), 5);
        let errors = lines(&mock, &batch["error_file_id"]).await;
        assert_eq!(errors.len(), 5);
        assert!(
            errors.values().all(|row| row["error"]["code"] == code),
            "{errors:?}"
        );
        assert_eq!(mock.stats().billed.answers, 5);
    }
}

#[tokio::test(start_paused = true)]
async fn cancelling_an_ended_batch_is_rejected() {
    let mock = mock("");
    let (_, path) = create(&mock, &rows(4)).await;
    advance_seconds(60 + 900).await;
    let cancel = format!("{path}/cancel");
    for _ in 0..2 {
        let reply = call(&mock, "POST", &cancel, b"").await;
        assert_eq!(json_of(&reply)["status"], "cancelling");
    }
    advance_seconds(60).await;
    let batch = get(&mock, &path).await;
    assert_eq!(batch["status"], "cancelled");
    assert_eq!(lines(&mock, &batch["output_file_id"]).await.len(), 1);
    assert_eq!(call(&mock, "POST", &cancel, b"").await.status, 409);
}

#[tokio::test(start_paused = true)]
async fn enqueued_token_limit_fails_the_batch_in_validation() {
    // A row has 6 prompt tokens and up to 16 output tokens.
    let mock = mock("[batch]\nenqueued_tokens = 50");
    let (_, first) = create(&mock, &rows(2)).await;
    let (second, path) = create(&mock, &rows(2)).await;
    assert_eq!(second["status"], "validating");
    advance_seconds(60).await;
    let batch = get(&mock, &path).await;
    assert_eq!(batch["status"], "failed");
    assert_eq!(batch["errors"]["data"][0]["code"], "token_limit_exceeded");
    advance_seconds(10_000).await;
    assert_eq!(get(&mock, &first).await["status"], "completed");
    let (_, path) = create(&mock, &rows(2)).await;
    advance_seconds(10_000).await;
    assert_eq!(get(&mock, &path).await["status"], "completed");
}

#[tokio::test(start_paused = true)]
async fn batch_with_lost_reply_is_listed() {
    let mock = mock("[batch]\nlost_creates = 1\nstatus = \"queued\"");
    let file = upload(&mock, &rows(1)).await;
    let lost = send(&mock, "POST", "/v1/batches", &create_body(&file)).await;
    assert_eq!(lost, MockResponse::Reset);
    let list = get(&mock, "/v1/batches?limit=2").await;
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
    assert_eq!(list["data"][0]["metadata"]["nonce"], "n1");
    for _ in 0..2 {
        assert_eq!(
            call(&mock, "POST", "/v1/batches", &create_body(&file))
                .await
                .status,
            200
        );
    }
    // Newest first, in pages.
    let ids = |list: &Value| -> Vec<String> {
        let data = list["data"].as_array().unwrap();
        data.iter()
            .map(|batch| batch["id"].as_str().unwrap().to_string())
            .collect()
    };
    let first = get(&mock, "/v1/batches?limit=2").await;
    assert_eq!(first["has_more"], true);
    let after = first["last_id"].as_str().unwrap();
    let second = get(&mock, &format!("/v1/batches?limit=2&after={after}")).await;
    assert_eq!(second["has_more"], false);
    assert_eq!(ids(&second), ids(&list));
    assert!(!ids(&first).contains(&ids(&list)[0]));
    // The script reports another status instead of `in_progress`.
    advance_seconds(60).await;
    assert_eq!(
        get(&mock, "/v1/batches").await["data"][0]["status"],
        "queued"
    );
}

#[tokio::test(start_paused = true)]
async fn uploaded_file_is_missing_at_first_if_scripted() {
    let mock = mock("[batch]\nmissing_s = 1");
    let file = upload(&mock, &rows(1)).await;
    let path = format!("/v1/files/{file}");
    assert_eq!(call(&mock, "GET", &path, b"").await.status, 404);
    let rejected = call(&mock, "POST", "/v1/batches", &create_body(&file)).await;
    assert_eq!(rejected.status, 400);
    assert!(
        json_of(&rejected)["error"]["message"]
            .as_str()
            .unwrap()
            .contains("No such File")
    );
    advance_seconds(1).await;
    assert_eq!(get(&mock, &path).await["filename"], "in.jsonl");
    assert_eq!(
        call(&mock, "POST", "/v1/batches", &create_body(&file))
            .await
            .status,
        200
    );
    assert_eq!(get(&mock, "/v1/files").await["data"][0]["id"], file);
    assert_eq!(call(&mock, "DELETE", &path, b"").await.status, 200);
    assert_eq!(call(&mock, "GET", &path, b"").await.status, 404);
}

#[tokio::test(start_paused = true)]
async fn invalid_batch_requests_are_rejected() {
    let mock = mock("");
    let file = upload(&mock, &rows(1)).await;
    let create_body_with = |name: &str, value: Value| {
        let mut body: Value = serde_json::from_slice(&create_body(&file)).unwrap();
        body[name] = value;
        body.to_string().into_bytes()
    };
    for (method, path, body, status) in [
        ("POST", "/v1/files", b"no form".to_vec(), 400),
        ("POST", "/v1/batches", b"{".to_vec(), 400),
        (
            "POST",
            "/v1/batches",
            create_body_with("endpoint", json!(null)),
            400,
        ),
        (
            "POST",
            "/v1/batches",
            create_body_with("completion_window", json!("soon")),
            400,
        ),
        (
            "POST",
            "/v1/batches",
            create_body_with("input_file_id", json!("file-x")),
            400,
        ),
        ("GET", "/v1/batches/batch_x", Vec::new(), 404),
        ("POST", "/v1/batches/batch_x/cancel", Vec::new(), 404),
        ("GET", "/v1/files/file-x/content", Vec::new(), 404),
        ("PUT", "/v1/batches", Vec::new(), 405),
    ] {
        let reply = call(&mock, method, path, &body).await;
        assert_eq!(reply.status, status, "{method} {path}");
        assert!(json_of(&reply)["error"]["message"].is_string());
    }
}

#[tokio::test(start_paused = true)]
async fn faults_with_path_apply_to_that_path() {
    let mock = mock(
        "[[faults]]\nkind = \"http 503\"\npath = \"/v1/batches/\"\nfirst = 1\n\
         [[faults]]\nkind = \"reset in body\"\npath = \"/content\"\nfirst = 1\n\
         [[faults]]\nkind = \"http 500\"\nmatching = \"not in any row\"",
    );
    let (_, path) = create(&mock, &rows(2)).await;
    assert_eq!(call(&mock, "GET", &path, b"").await.status, 503);
    advance_seconds(10_000).await;
    let batch = get(&mock, &path).await;
    let content = format!(
        "/v1/files/{}/content",
        batch["output_file_id"].as_str().unwrap()
    );
    let MockResponse::ResetInBody(reply) = send(&mock, "GET", &content, b"").await else {
        panic!("the response is not a reset in the body");
    };
    assert_eq!(call(&mock, "GET", &content, b"").await.body, reply.body);
    assert_eq!(mock.stats().billed.answers, 2);
}
