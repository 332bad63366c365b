"""What reports share, whatever they are about: how figures look and are written, and how pages hold them."""
