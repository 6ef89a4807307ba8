"""From files to batches: sources of documents, tokenizers, chat templates, and the resumable token stream."""
