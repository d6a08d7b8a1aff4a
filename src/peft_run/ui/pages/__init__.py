"""One file a page: `build(page)` puts its components into the page's Blocks."""
