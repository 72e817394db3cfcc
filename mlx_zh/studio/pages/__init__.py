"""The studio's pages, each with a builder; `frame.PAGES` names them."""
