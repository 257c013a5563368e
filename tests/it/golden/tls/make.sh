#!/usr/bin/env bash
# Makes the certificates of tests/it/harvest/tls.rs: an authority of its own, a server on loopback, a client.
set -euo pipefail
cd "$(dirname "$0")"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj "/CN=distill test authority" \
    -keyout ca.key -out ca.pem -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign" 2> /dev/null
for name in server client; do
    usage=$([ "$name" = server ] && echo serverAuth || echo clientAuth)
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$name" -keyout "$name.key" -out "$name.csr" 2> /dev/null
    openssl x509 -req -in "$name.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days 36500 -out "$name.crt" \
        -extfile <(printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=%s\n' "$usage") 2> /dev/null
done
cat client.crt client.key > client.pem
cat server.crt server.key > server.pem
rm -f ./*.csr ./*.srl ./*.crt ca.key client.key server.key
