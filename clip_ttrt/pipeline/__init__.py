"""From files to features: pictures decoded and preprocessed in bulk, embedded, and written."""
