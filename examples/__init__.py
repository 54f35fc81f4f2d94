"""Examples that run from the checkout's root; each is one file to copy and change."""
