// Unpacks plotly.js, which comes gzipped from the kernel, and puts it where every board of the page finds it.

async function unpack(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const code = await new Response(stream).text();
  // plotly.js hands itself to a CommonJS `module` if there is one; give it one inside an ES module of its own
  const wrapped = `const module = { exports: {} };\n${code}\nexport default module.exports;`;
  const url = URL.createObjectURL(new Blob([wrapped], { type: "text/javascript" }));
  try {
    return (await import(/* webpackIgnore: true */ url)).default;
  } finally {
    URL.revokeObjectURL(url);
  }
}

export default {
  async initialize({ model }) {
    const place = shelf();
    if (place.begun) return;
    place.begun = true;
    try {
      place.plotly = await unpack(model.get("code"));
    } catch (error) {
      place.begun = false; // the next request may fare better
      throw error;
    }
  },
};
