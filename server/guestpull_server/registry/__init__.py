"""Where bytes come from: references, authentication, the distribution client."""
