"""Pages in one HTML file each, which need no network and no script."""
