// Where the page keeps plotly.js, for all boards; stands before every script that asks for it.
const SHELF = Symbol.for("polrl.plotly");

function shelf() {
  if (!globalThis[SHELF]) {
    const made = { freeAt: 0, quickAt: 0 };
    made.ready = new Promise((resolve) => (made.resolve = resolve));
    made.ready.then((plotly) => (made.plotly = plotly));
    globalThis[SHELF] = made;
  }
  return globalThis[SHELF];
}

