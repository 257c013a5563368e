# Sourced by the rehearsals. Starts `$distill serve` in the background and waits until it listens. Sets `server` to its
# process id, which the script must kill, and `url` to its address.
#
#     serve ARGUMENTS

serve() {
    "$distill" serve "$@" --port 0 > server.out 2> server.err &
    server=$!
    until grep -q listening server.out; do
        kill -0 "$server" 2> /dev/null || { cat server.err >&2; exit 1; }
        sleep 0.1
    done
    url=$(sed -n 's/^listening on //p' server.out)
}
