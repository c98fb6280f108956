// Where the page keeps plotly.js, for all boards; stands before every script that asks for it.
const SHELF = Symbol.for("polrl.plotly");

function shelf() {
  if (!globalThis[SHELF]) {
    globalThis[SHELF] = { freeAt: 0, quickAt: 0 };
  }
  return globalThis[SHELF];
}

