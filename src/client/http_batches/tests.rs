//! Bytes of the requests of the files and batches API.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::client::http_batches::*;
use crate::config::TeacherConfig;

/// Accepts a connection, replies with an empty object and returns the bytes of the request as text.
async fn record_request(listener: &TcpListener) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    while !is_complete(&request) {
        assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
    }
    let reply = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}";
    stream.write_all(reply).await.unwrap();
    String::from_utf8(request).unwrap()
}

fn is_complete(request: &[u8]) -> bool {
    let request = String::from_utf8_lossy(request);
    let Some((head, body)) = request.split_once("\r\n\r\n") else {
        return false;
    };
    if head.contains("transfer-encoding: chunked") {
        return body.ends_with("\r\n0\r\n\r\n");
    }
    let length = head.split("content-length: ").nth(1);
    let length = length.and_then(|text| text.lines().next());
    body.len() == length.map_or(0, |length| length.parse().unwrap())
}

/// Replaces the parts that vary: port, version and random multipart boundary; and CRLF by LF.
fn normalise(request: &str) -> String {
    let user_agent = concat!("distill/", env!("CARGO_PKG_VERSION"));
    let text = request.replace("\r\n", "\n");
    let mut text = text.replace(user_agent, "distill/VERSION");
    if let Some((_, port)) = text.split_once("host: 127.0.0.1:") {
        let port = port.lines().next().unwrap().to_owned();
        text = text.replace(&format!("127.0.0.1:{port}"), "HOST");
    }
    if let Some((_, boundary)) = text.split_once("boundary=") {
        let boundary = boundary.lines().next().unwrap().to_owned();
        text = text.replace(&boundary, "BOUNDARY");
    }
    text
}

#[tokio::test]
async fn file_and_batch_requests_match_the_golden_bytes() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "sk-0123456789").unwrap();
    let requests = folder.path().join("part 1.jsonl");
    std::fs::write(&requests, "{\"custom_id\":\"1\"}\n").unwrap();
    let teacher = HttpTeacher::new(&TeacherConfig {
        base_url: format!("http://{}/v1/", listener.local_addr().unwrap()),
        api_key_file: Some(key),
        headers: [("X-Team".to_owned(), "a".to_owned())].into(),
        query: [("api-version".to_owned(), "2 0".to_owned())].into(),
        ..TeacherConfig::default()
    });
    let teacher = teacher.unwrap();
    let upload = teacher.upload_request(&requests).await.unwrap();
    assert_eq!(upload.timeout(), Some(&UPLOAD_TIMEOUT));
    let create = json!({"input_file_id": "file-1", "metadata": {"nonce": "n"}});
    let calls = [
        teacher.upload(&requests),
        teacher.create(&create),
        teacher.retrieve("batch_1"),
        teacher.list(None),
        teacher.list(Some("batch_1")),
        teacher.cancel("batch_1"),
    ];
    let mut sent = String::new();
    for call in calls {
        let (request, reply) = tokio::join!(record_request(&listener), call);
        assert_eq!(reply.unwrap().body, "{}");
        sent.push_str(&normalise(&request));
        sent.push_str("\n====\n");
    }
    assert_eq!(sent, include_str!("requests.txt"));
}
