"""Where tokens come from: sources of documents, tokenizer, chat rendering, and the resumable token stream."""
