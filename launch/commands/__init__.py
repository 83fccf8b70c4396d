"""One module a verb: arguments first, heavy imports only once the verb runs."""
