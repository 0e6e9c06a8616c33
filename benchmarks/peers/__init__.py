"""The contestants of benchmarks.messaging: one small file for each kind, all behind the same interface."""
