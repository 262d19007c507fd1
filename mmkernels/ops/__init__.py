"""One folder per op: ``api`` (public function), ``schema`` (torch ops), ``reference`` (definition),
``triton`` (kernels)."""
