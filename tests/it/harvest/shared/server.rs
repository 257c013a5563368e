//! A Redis server for one test.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use redis::{Connection, FromRedisValue, cmd};
use tempfile::TempDir;

/// A server without persistence, which is killed when dropped.
pub struct Redis {
    process: Child,
    dir: TempDir,
    port: u16,
    password: Option<String>,
}

impl Redis {
    pub fn start() -> Redis {
        Redis::with_password(None)
    }

    pub fn with_password(password: Option<&str>) -> Redis {
        let dir = tempfile::tempdir().unwrap();
        let password = password.map(String::from);
        // Another process may take the port before the server does.
        for _ in 0..5 {
            let port = free_port();
            if let Some(process) = launch(&dir, port, password.as_deref()) {
                return Redis {
                    process,
                    dir,
                    port,
                    password,
                };
            }
        }
        panic!("redis-server does not start");
    }

    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts an empty server on the port of the killed one.
    pub fn restart(&mut self) {
        let process = launch(&self.dir, self.port, self.password.as_deref());
        self.process = process.expect("redis-server does not start again");
    }

    pub fn url(&self) -> String {
        let port = self.port;
        match &self.password {
            Some(password) => format!("redis://:{password}@127.0.0.1:{port}/0"),
            None => format!("redis://127.0.0.1:{port}/0"),
        }
    }

    pub fn connect(&self) -> Connection {
        redis::Client::open(self.url())
            .unwrap()
            .get_connection()
            .unwrap()
    }

    /// Sends a command, given as words separated by spaces. Returns its reply.
    pub fn command<T: FromRedisValue>(&self, words: &str) -> T {
        let mut words = words.split(' ');
        let mut command = cmd(words.next().unwrap());
        for word in words {
            command.arg(word);
        }
        command.query(&mut self.connect()).unwrap()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns an unused loopback port.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Starts a server and waits until it accepts connections. Returns None if it exits instead.
fn launch(dir: &TempDir, port: u16, password: Option<&str>) -> Option<Child> {
    let mut command = Command::new("redis-server");
    command
        .args(["--bind", "127.0.0.1", "--port", &port.to_string()])
        .args(["--save", "", "--appendonly", "no", "--dir"])
        .arg(dir.path())
        .stdout(Stdio::null());
    if let Some(password) = password {
        command.args(["--requirepass", password]);
    }
    let mut process = command.spawn().unwrap_or_else(|error| {
        panic!(
            "these tests need `redis-server` on the path ({error}): install it, as with \
             `apt-get install redis-server`"
        )
    });
    let started = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if process.try_wait().unwrap().is_some() {
            return None;
        }
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "redis-server does not accept connections"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    Some(process)
}
