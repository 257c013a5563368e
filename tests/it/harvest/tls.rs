//! Endpoints with a private certificate authority, and endpoints that require a client certificate.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use super::{Run, exit_of};
use crate::fault_server::completion;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it/golden/tls")
        .join(name)
}

/// Starts a server that answers `hi` after a successful handshake. Returns its base URL.
fn serve(requires_client_certificate: bool) -> String {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(golden("ca.pem")).unwrap())
        .unwrap();
    let builder = if requires_client_certificate {
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
            .build()
            .unwrap();
        ServerConfig::builder().with_client_cert_verifier(verifier)
    } else {
        ServerConfig::builder().with_no_client_auth()
    };
    let certificate = CertificateDer::from_pem_file(golden("server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(golden("server.pem")).unwrap();
    let config = Arc::new(builder.with_single_cert(vec![certificate], key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = StreamOwned::new(connection, socket.unwrap());
            let mut request = vec![0; 1 << 16];
            // Some tests expect a failed handshake.
            let Ok(1..) = stream.read(&mut request) else {
                continue;
            };
            let body = completion("hi", 0).to_string();
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all((head + &body).as_bytes());
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    format!("https://{address}/v1")
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_certificate_authority_error_names_ca_file() {
    let base_url = serve(false);
    let mut run = Run::at(&base_url, &["a"]);
    run.config.retry.max_attempts = 2;
    let summary = run.harvest().await;
    let (code, message) = exit_of(&summary);
    assert_eq!((code, summary.ok), (1, 0), "{message}");
    assert!(message.contains("teacher.ca_file"), "{message}");
    run.config.teacher.ca_file = Some(golden("ca.pem"));
    let summary = run.harvest().await;
    assert_eq!((exit_of(&summary), summary.ok), ((0, String::new()), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificate_is_presented() {
    let base_url = serve(true);
    let mut run = Run::at(&base_url, &["a"]);
    run.config.teacher.ca_file = Some(golden("ca.pem"));
    run.config.retry.max_attempts = 2;
    let summary = run.harvest().await;
    assert_eq!(summary.ok, 0, "without a client certificate");
    // The failed attempts may have been billed and would count in a second run in the same folder.
    run.config.run_dir = run.dir.path().join("another");
    run.config.teacher.client_certificate = Some(golden("client.pem"));
    let summary = run.harvest().await;
    assert_eq!((exit_of(&summary), summary.ok), ((0, String::new()), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_or_malformed_certificate_file_is_a_usage_error() {
    let mut run = Run::at("https://127.0.0.1:9/v1", &["a"]);
    run.write("empty.pem", "no certificate");
    for name in ["none.pem", "empty.pem"] {
        let file = Some(run.dir.path().join(name));
        for is_ca in [true, false] {
            run.config.teacher.ca_file = file.clone().filter(|_| is_ca);
            run.config.teacher.client_certificate = file.clone().filter(|_| !is_ca);
            let error = run.harvest_error().await;
            assert_eq!(distill::exit::Exit::code_of(&error), 2, "{error:#}");
            assert!(error.to_string().contains(name), "{error:#}");
        }
    }
}
