"""`pgtask web`: the console, pages of HTML over HTTP (extra `web`)."""
