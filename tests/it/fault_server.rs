//! A scripted HTTP/1.1 server on loopback that can also break the protocol.
//!
//! It writes to the TCP socket itself, since an HTTP library would refuse to produce these faults: a reset in the
//! middle of a body, or a wrong `content-length`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A received request.
#[derive(Debug, Clone)]
pub struct RecordedRequest {
    /// Number of earlier requests to this server.
    pub number: usize,
    /// Number of earlier requests with the same body.
    pub repeat: usize,
    pub path: String,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
    pub body: Value,
    pub at: Instant,
}

impl RecordedRequest {
    pub fn header(&self, name: &str) -> Option<&str> {
        let header = self.headers.iter().find(|(other, _)| other == name);
        header.map(|(_, value)| value.as_str())
    }

    /// Returns the content of the last message.
    pub fn prompt(&self) -> &str {
        let messages = self.body["messages"].as_array().unwrap();
        messages.last().unwrap()["content"].as_str().unwrap()
    }
}

/// Reaction of the server to a request.
#[derive(Debug, Clone)]
pub enum Reaction {
    /// Sends a complete reply: status, headers and body.
    Reply(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Waits before another reaction.
    After(Duration, Box<Reaction>),
    /// Resets the connection without sending a byte.
    Reset,
    /// Sends the headers and half of the body, then resets the connection.
    ResetInBody(Vec<u8>),
    /// Sends the content length of the whole body and half of the body, then closes the connection normally.
    ShortBody(Vec<u8>),
    /// Sends a chunked body without its last chunk, then closes the connection.
    UnfinishedChunks(Vec<u8>),
    /// Sends nothing and keeps the connection open.
    Stall,
}

/// Returns a reply with a JSON body.
pub fn reply(status: u16, body: Value) -> Reaction {
    Reaction::Reply(status, Vec::new(), body.to_string().into_bytes())
}

/// Returns a reply with a JSON body and one header.
pub fn reply_with(status: u16, name: &'static str, value: &str, body: Value) -> Reaction {
    Reaction::Reply(
        status,
        vec![(name, value.into())],
        body.to_string().into_bytes(),
    )
}

/// Returns an error body in OpenAI's format.
pub fn error(message: &str, code: &str) -> Value {
    json!({"error": {"message": message, "type": "t", "param": null, "code": code}})
}

/// Returns a chat completion with this text. Each character is a token, with `top_logprobs` alternatives.
pub fn completion(text: &str, top_logprobs: u64) -> Value {
    let alternatives: Vec<_> = (0..top_logprobs)
        .map(|rank| json!({"token": format!("t{rank}"), "logprob": -0.5 - rank as f64, "bytes": format!("t{rank}").as_bytes()}))
        .collect();
    let content: Vec<_> = text
        .chars()
        .map(|char| {
            let token = char.to_string();
            json!({"token": token, "logprob": -0.5, "bytes": token.as_bytes(), "top_logprobs": alternatives})
        })
        .collect();
    let logprobs = (top_logprobs > 0).then(|| json!({"content": content, "refusal": null}));
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1_800_000_000, "model": "m-reported",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
            "logprobs": logprobs, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": text.chars().count(), "total_tokens": 0},
    })
}

/// Answers a request with its last message in capitals.
pub fn answer(request: &RecordedRequest) -> Reaction {
    let top_logprobs = request.body["top_logprobs"].as_u64().unwrap_or(0);
    reply(
        200,
        completion(&request.prompt().to_uppercase(), top_logprobs),
    )
}

/// A running server, with the requests that it has received.
pub struct FaultServer {
    pub base_url: String,
    requests: Arc<Mutex<Vec<RecordedRequest>>>,
    in_flight: Arc<AtomicUsize>,
}

impl FaultServer {
    /// Serves on a free port until the runtime ends. `script` returns the reaction to each request.
    pub async fn start(
        script: impl Fn(&RecordedRequest) -> Reaction + Send + Sync + 'static,
    ) -> FaultServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = FaultServer {
            base_url: format!("http://{}/v1", listener.local_addr().unwrap()),
            requests: Arc::default(),
            in_flight: Arc::default(),
        };
        let (requests, in_flight) = (Arc::clone(&server.requests), Arc::clone(&server.in_flight));
        let script = Arc::new(script);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (requests, in_flight) = (Arc::clone(&requests), Arc::clone(&in_flight));
                let script = Arc::clone(&script);
                tokio::spawn(async move {
                    // Fails if the client closes the connection.
                    let _ = serve(stream, &requests, &in_flight, script.as_ref()).await;
                });
            }
        });
        server
    }

    pub fn requests(&self) -> Vec<RecordedRequest> {
        self.requests.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    /// Returns the number of requests whose reaction is not complete.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }
}

async fn serve(
    mut stream: TcpStream,
    requests: &Mutex<Vec<RecordedRequest>>,
    in_flight: &AtomicUsize,
    script: &(impl Fn(&RecordedRequest) -> Reaction + Sync),
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    while let Some((path, headers, body)) = read_request(&mut stream, &mut buffer).await? {
        let request = {
            let mut requests = requests.lock().unwrap();
            let request = RecordedRequest {
                number: requests.len(),
                repeat: requests.iter().filter(|other| other.body == body).count(),
                path,
                headers,
                body,
                at: Instant::now(),
            };
            requests.push(request.clone());
            request
        };
        in_flight.fetch_add(1, Ordering::SeqCst);
        let result = react(&mut stream, script(&request)).await;
        in_flight.fetch_sub(1, Ordering::SeqCst);
        if !result? {
            break;
        }
    }
    Ok(())
}

/// Reacts to a request. Returns true if the connection can be used for another one.
async fn react(stream: &mut TcpStream, mut reaction: Reaction) -> std::io::Result<bool> {
    while let Reaction::After(wait, next) = reaction {
        tokio::time::sleep(wait).await;
        reaction = *next;
    }
    match reaction {
        Reaction::Reply(status, headers, body) => {
            let mut head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n", body.len());
            for (name, value) in headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            stream.write_all(format!("{head}\r\n").as_bytes()).await?;
            stream.write_all(&body).await?;
            return Ok(true);
        }
        Reaction::Reset => stream.set_zero_linger()?,
        Reaction::ResetInBody(body) => {
            send_half(stream, &body).await?;
            // Without this pause, the reset may discard the bytes that were sent.
            tokio::time::sleep(Duration::from_millis(20)).await;
            stream.set_zero_linger()?;
        }
        Reaction::ShortBody(body) => send_half(stream, &body).await?,
        Reaction::UnfinishedChunks(body) => {
            let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).await?;
            stream
                .write_all(format!("{:x}\r\n", body.len()).as_bytes())
                .await?;
            stream.write_all(&body).await?;
            stream.write_all(b"\r\n").await?;
        }
        Reaction::Stall => std::future::pending().await,
        Reaction::After(..) => unreachable!("unwrapped above"),
    }
    Ok(false)
}

async fn send_half(stream: &mut TcpStream, body: &[u8]) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body[..body.len() / 2]).await
}

/// Path, headers and JSON body of a request.
type Request = (String, Vec<(String, String)>, Value);

/// Reads the next request. Returns None if the client closed the connection.
async fn read_request(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
) -> std::io::Result<Option<Request>> {
    let head_end = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8(buffer[..head_end].to_vec()).unwrap();
    let mut lines = head.split("\r\n");
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_string();
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_string()))
        .collect();
    let length: usize = headers
        .iter()
        .find(|(name, _)| name == "content-length")
        .map_or(0, |(_, value)| value.parse().unwrap());
    let end = head_end + 4 + length;
    while buffer.len() < end {
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
    let body = serde_json::from_slice(&buffer[head_end + 4..end]).unwrap_or_default();
    buffer.drain(..end);
    Ok(Some((path, headers, body)))
}
