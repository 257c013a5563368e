//! The mock over real TCP, with raw requests and with a harvest.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use distill::mock::{Mock, http};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use super::{body, script, text};
use crate::harvest::Run;

/// A mock that serves on loopback until the runtime ends.
pub struct Server {
    pub mock: Arc<Mock>,
    pub address: SocketAddr,
}

/// The end of a connection.
#[derive(Debug, PartialEq)]
pub enum ConnectionEnd {
    Closed,
    Reset,
    /// Still open when the test stopped waiting.
    Open,
}

impl Server {
    pub async fn start(text: &str) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mock = Arc::new(Mock::new(script(text)));
        tokio::spawn(http::serve(Arc::clone(&mock), listener));
        Server { mock, address }
    }

    /// Sends a chat request on a new connection. Returns the received bytes and the end of the connection. Stops
    /// waiting after 150 ms without a byte, or after `max_wait`.
    pub async fn exchange(&self, body: &[u8], max_wait: Duration) -> (Vec<u8>, ConnectionEnd) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream
            .write_all(&post(body, "connection: close\r\n"))
            .await
            .unwrap();
        let mut received = Vec::new();
        let start = Instant::now();
        let end = loop {
            if start.elapsed() > max_wait {
                break ConnectionEnd::Open;
            }
            match timeout(Duration::from_millis(150), stream.read_buf(&mut received)).await {
                Err(_) => break ConnectionEnd::Open,
                Ok(Ok(0)) => break ConnectionEnd::Closed,
                Ok(Ok(_)) => {}
                Ok(Err(error)) if error.kind() == ErrorKind::ConnectionReset => {
                    break ConnectionEnd::Reset;
                }
                Ok(Err(error)) => panic!("{error}"),
            }
        };
        (received, end)
    }
}

fn post(body: &[u8], headers: &str) -> Vec<u8> {
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\n{headers}content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Reads the next reply of a keep-alive connection: its status and its body.
async fn reply(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> (u16, Value) {
    loop {
        if let Some(head_end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8(buffer[..head_end].to_vec()).unwrap();
            let (_, length) = head.split_once("content-length: ").unwrap();
            let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
            let body_start = head_end + 4;
            let end = body_start + length;
            if buffer.len() >= end {
                let body = serde_json::from_slice(&buffer[body_start..end]).unwrap();
                buffer.drain(..end);
                return (head[9..12].parse().unwrap(), body);
            }
        }
        let count = timeout(Duration::from_secs(10), stream.read_buf(buffer)).await;
        assert_ne!(count.unwrap().unwrap(), 0, "the connection is closed");
    }
}

#[tokio::test]
async fn keep_alive_connection_accepts_pipelined_split_and_chunked_requests() {
    let server = Server::start("[answers]\ntext = \"upper\"\nlatency_s = 0.01").await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let mut buffer = Vec::new();
    let pipelined = ["a", "b", "c"].map(|content| post(&body(content, json!({})), ""));
    stream.write_all(&pipelined.concat()).await.unwrap();
    for expected in ["A", "B", "C"] {
        let (status, answer) = reply(&mut stream, &mut buffer).await;
        assert_eq!((status, text(&answer)), (200, expected));
    }
    for byte in post(&body("in pieces", json!({})), "expect: 100-continue\r\n") {
        stream.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    // The interim response is optional here, because the client sends the body without waiting for it.
    let interim = b"HTTP/1.1 100 Continue\r\n\r\n";
    let mut received = vec![0; interim.len()];
    stream.read_exact(&mut received).await.unwrap();
    if received != interim {
        buffer.extend(received);
    }
    let (_, answer) = reply(&mut stream, &mut buffer).await;
    assert_eq!(text(&answer), "IN PIECES");
    let chunked = {
        let body = body("chunks", json!({}));
        let (first, second) = body.split_at(10);
        let head = "POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\na\r\n";
        let size = format!("\r\n{:x}\r\n", second.len());
        let end = b"\r\n0\r\n\r\n";
        [head.as_bytes(), first, size.as_bytes(), second, end].concat()
    };
    stream.write_all(&chunked).await.unwrap();
    let (_, answer) = reply(&mut stream, &mut buffer).await;
    assert_eq!(text(&answer), "CHUNKS");
    let stats = server.mock.stats();
    assert_eq!((stats.connections, stats.requests), (1, 5));
}

#[tokio::test]
async fn malformed_and_unknown_requests_get_their_status() {
    let server = Server::start("").await;
    for (input, status) in [
        (&b"hello\r\n\r\n"[..], 400),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/chat/completions HTTP/1.1\r\n\r\n", 405),
        (
            b"POST /v1/x HTTP/1.1\r\ncontent-length: 9999999999\r\n\r\n",
            413,
        ),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", 200),
        (b"GET /v1/models/mock HTTP/1.1\r\n\r\n", 200),
        (b"GET /v1/models/other HTTP/1.1\r\n\r\n", 404),
    ] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(input).await.unwrap();
        let (actual, _) = reply(&mut stream, &mut Vec::new()).await;
        assert_eq!(actual, status, "{}", String::from_utf8_lossy(input));
    }
}

#[tokio::test]
async fn disconnect_releases_concurrency_slot() {
    let server = Server::start("[answers]\nlatency_s = 3600\n[limits]\nconcurrency = 1").await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream
        .write_all(&post(&body("hi", json!({})), ""))
        .await
        .unwrap();
    let wait_until = async |condition: &dyn Fn() -> bool| {
        for _ in 0..500 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("{:?}", server.mock.stats());
    };
    wait_until(&|| server.mock.stats().in_flight == 1).await;
    drop(stream);
    wait_until(&|| server.mock.stats().abandoned == 1).await;
    assert_eq!(server.mock.stats().in_flight, 0);
}

#[tokio::test]
async fn stats_route_returns_the_counts() {
    let server =
        distill::mock::server::start(script("threads = 2"), [127, 0, 0, 1].into(), 0).unwrap();
    let address = server.base_url();
    let address = address
        .strip_prefix("http://")
        .unwrap()
        .strip_suffix("/v1")
        .unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(&post(&body("hi", json!({})), ""))
        .await
        .unwrap();
    let mut buffer = Vec::new();
    reply(&mut stream, &mut buffer).await;
    stream
        .write_all(b"GET /mock/stats HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    let (status, stats) = reply(&mut stream, &mut buffer).await;
    assert_eq!(status, 200);
    assert_eq!(stats["requests"], 1);
    assert_eq!(stats["billed"]["answers"], 1);
    assert_eq!(stats["bodies_by_times_billed"], json!({"1": 1}));
    let stopped = tokio::task::spawn_blocking(|| server.stop()).await.unwrap();
    assert_eq!((stopped.requests, stopped.connections), (1, 1));
    assert_eq!(
        stream.read(&mut [0]).await.unwrap_or(0),
        0,
        "the connection is still open"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn harvest_completes_every_prompt_despite_faults() {
    let server = Server::start(
        "seed = 3\nmodel = \"m\"\n[answers]\ntext = \"upper\"\n\
         [limits]\nrequests_per_minute = 30000\nburst_s = 0.02\nretry_after = \"ms\"\nheaders = \"none\"\n\
         [[faults]]\nkind = \"reset in body\"\nshare = 0.1\nfirst = 3\n\
         [[faults]]\nkind = \"http 503\"\nshare = 0.1\nfirst = 3\n\
         [[faults]]\nkind = \"truncated\"\nshare = 0.1\nfirst = 3\n\
         [[faults]]\nkind = \"html 502\"\nshare = 0.1\nfirst = 3\n\
         [[faults]]\nkind = \"blank lines\"\nshare = 0.2",
    )
    .await;
    let prompts: Vec<String> = (0..200).map(|index| format!("prompt {index}")).collect();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let run = Run::at(&format!("http://{}/v1", server.address), &prompts);
    let summary = run.harvest().await;
    assert_eq!((summary.ok, summary.failed), (200, 0), "{summary:?}");
    let stats = server.mock.stats();
    assert_eq!(stats.bodies, 200);
    assert_eq!(stats.requests, summary.requests);
    assert!(stats.throttled > 0, "{stats:?}");
    assert_eq!(stats.faults.len(), 5, "{stats:?}");
    // Answers that were cut off are billed and requested again.
    let cut_off = stats.faults["reset in body"] + stats.faults["truncated"];
    assert_eq!(stats.billed.answers, 200 + cut_off);
    assert_eq!(stats.bodies_by_times_billed.get(&0), None);
}
