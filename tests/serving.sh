# Sourced by the rehearsals. Starts `$distill serve` in the background, to be ended with the script, and waits until it
# listens: `server` is its process then, `url` its address.
#
#     serve ARGUMENTS

serve() {
    "$distill" serve "$@" --port 0 > server.out 2> /dev/null &
    server=$!
    until grep -q listening server.out; do sleep 0.1; done
    url=$(sed -n 's/^listening on //p' server.out)
}
