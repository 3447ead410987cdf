"""Inside tests that only the harness's own tests run: each does one thing that the host must notice."""
