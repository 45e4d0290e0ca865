"""One file a command: parse, call one plain function, print."""
