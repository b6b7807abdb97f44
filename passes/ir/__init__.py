"""The values that all passes share (attention calls, KV sources), and helpers that read and write FX graphs."""
