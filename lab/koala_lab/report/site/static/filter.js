// "Be the filter": KOALA on a valley of two weights. The first part computes what koala_lib/kalman.py computes, in its
// words and in its order of operations; tests/koala_lab/test_explorable.py holds it to that. The second part draws.
"use strict";

// ---- the filter

const innovationVariance = (variance, squaredNorm, measurementNoise) => variance * squaredNorm + measurementNoise;

const predictPosition = (variance, processNoise) => variance + processNoise;

// (13)
const conditionPosition = (variance, squaredNorm, measurementNoise) =>
  variance * (measurementNoise / innovationVariance(variance, squaredNorm, measurementNoise));

// (19): variance of the position, covariance, variance of the velocity
const predictMomentum = ([A, C, B], momentum, processNoise, velocityNoise) => [
  A + 2 * C + B + processNoise,
  momentum * (C + B),
  momentum ** 2 * B + velocityNoise,
];

// (21)
function conditionMomentum([A, C, B], squaredNorm, measurementNoise) {
  const S = A * squaredNorm + measurementNoise;
  const shrink = measurementNoise / S;
  return [A * shrink, C * shrink, B - C * (squaredNorm / S) * C];
}

const CURVATURES = [1, 8];
const START = [-2.6, 1.1];
const VELOCITY_NOISE = 0.01;
const DEFAULTS = { R: 1, Q: 0.01, P0: 0.1, kappa: 0, noise: 0.35, steps: 60, seed: 1 };

// A small generator of random numbers (mulberry32), so that every reader sees the same noise; then Box and Muller.
function generator(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}

// The loss of the minibatch of a step is 1/2 sum_i h_i (x_i - xi_i)^2 with xi drawn anew; the target is 0.
function walk({ R, Q, P0, kappa, noise, steps, seed }) {
  const normal = generator(seed);
  let x = [...START];
  let p = [0, 0];
  let P = [P0, 0, P0];
  const trace = [];
  for (let k = 1; k <= steps; k++) {
    const shift = x.map(() => noise * normal());
    if (kappa > 0) {
      P = predictMomentum(P, kappa, Q, VELOCITY_NOISE);
      x = x.map((xi, i) => xi + p[i]);
      p = p.map((pi) => kappa * pi);
    } else {
      P = [predictPosition(P[0], Q), 0, 0];
    }
    const g = x.map((xi, i) => CURVATURES[i] * (xi - shift[i]));
    const e = x.reduce((sum, xi, i) => sum + (CURVATURES[i] * (xi - shift[i]) ** 2) / 2, 0);
    const squaredNorm = g[0] ** 2 + g[1] ** 2;
    const S = innovationVariance(P[0], squaredNorm, R);
    const step = { k, predicted: P[0], S, e, squaredNorm, shift, gain: (P[0] * squaredNorm) / S };
    x = x.map((xi, i) => xi - ((P[0] * e) / S) * g[i]); // (12)
    p = p.map((pi, i) => pi - ((P[1] * e) / S) * g[i]);
    P = kappa > 0 ? conditionMomentum(P, squaredNorm, R) : [conditionPosition(P[0], squaredNorm, R), 0, 0];
    const loss = x.reduce((sum, xi, i) => sum + (CURVATURES[i] * xi ** 2) / 2, 0);
    trace.push({ ...step, x, p, variance: P[0], covariance: P[1], velocityVariance: P[2], loss });
  }
  return trace;
}

// ---- the page

function explorable(place) {
  const chosen = { ...DEFAULTS };
  let at = 6;
  // log: the slider moves the exponent, and its left end is 0
  const SLIDERS = [
    { name: "R", label: "R, noise that a loss is said to have", low: -3, high: 3, log: true },
    { name: "Q", label: "Q, variance that every step adds", low: -6, high: 0, log: true },
    { name: "P0", label: "P₀, variance at the start", low: -4, high: 1, log: true },
    { name: "kappa", label: "κ, share of the velocity that is kept", low: 0, high: 0.95, log: false },
    { name: "noise", label: "noise that the losses have", low: 0, high: 1, log: false },
  ];
  const style = `
    #be-the-filter { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); margin: 1rem 0; }
    #be-the-filter .controls { display: grid; gap: 0.3rem 1.2rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
    #be-the-filter label { font-size: 0.85rem; display: block; }
    #be-the-filter label output { float: right; font-variant-numeric: tabular-nums; }
    #be-the-filter input { width: 100%; accent-color: #0173b2; }
    #be-the-filter button { font: inherit; font-size: 0.85rem; padding: 0.2rem 0.7rem; margin-right: 0.5rem; cursor: pointer;
      color: inherit; background: none; border: 1px solid currentColor; border-radius: 4px; }
    #be-the-filter svg { width: 100%; height: auto; overflow: hidden; }
    #be-the-filter text { fill: currentColor; font: 12px system-ui, sans-serif; }
    #be-the-filter .told { font-size: 0.9rem; font-variant-numeric: tabular-nums; }`;
  place.innerHTML =
    `<style>${style}</style><div class="controls"></div><div><button data-do="noise">other noise</button>` +
    `<button data-do="reset">as it was</button></div><div class="valley"></div><div class="told" role="status"></div>` +
    `<div class="plots"></div>`;
  const controls = place.querySelector(".controls");
  const wide = () => place.clientWidth > 560;

  const shown = (value) => (value === 0 ? "0" : value >= 0.01 && value < 1000 ? +value.toPrecision(2) + "" : value.toExponential(0));

  function control({ label, low, high, log, get, set, whole }) {
    const around = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "range", min: low, max: high });
    input.step = whole ? 1 : (high - low) / 120;
    const value = document.createElement("output");
    around.append(label, value, input);
    controls.append(around);
    const refresh = () => {
      input.value = log ? (get() > 0 ? Math.log10(get()) : low) : get();
      value.textContent = shown(get());
    };
    input.addEventListener("input", () => {
      set(log ? (+input.value <= low ? 0 : 10 ** +input.value) : +input.value);
      draw();
    });
    return refresh;
  }

  const refreshers = SLIDERS.map((slider) =>
    control({ ...slider, get: () => chosen[slider.name], set: (value) => (chosen[slider.name] = value) }),
  );
  refreshers.push(
    control({ label: "look at step", low: 1, high: DEFAULTS.steps, whole: true, get: () => at, set: (value) => (at = value) }),
  );
  place.querySelector("[data-do=noise]").addEventListener("click", () => {
    chosen.seed += 1;
    draw();
  });
  place.querySelector("[data-do=reset]").addEventListener("click", () => {
    Object.assign(chosen, DEFAULTS);
    at = 6;
    draw();
  });

  function valley(trace) {
    const [width, height, unit] = wide() ? [720, 300, 110] : [400, 200, 62];
    const X = (x) => width / 2 + unit * x;
    const Y = (y) => height / 2 - unit * y;
    const rings = [0.1, 0.4, 1, 2, 4, 8].map(
      (c) => `<ellipse cx="${X(0)}" cy="${Y(0)}" rx="${unit * Math.sqrt(2 * c)}" ry="${unit * Math.sqrt((2 * c) / 8)}"
        fill="none" stroke="currentColor" stroke-opacity="0.25"/>`,
    );
    const path = [START, ...trace.map((step) => step.x)];
    const line = path.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ");
    const dots = path.map(([x, y]) => `<circle cx="${X(x).toFixed(1)}" cy="${Y(y).toFixed(1)}" r="2.5" fill="#0173b2"/>`);
    const now = trace[at - 1];
    const radius = unit * Math.sqrt(now.variance);
    const [cx, cy] = [X(now.x[0]), Y(now.x[1])];
    return (
      `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="Contours of the loss and the path of the weights">` +
      rings.join("") +
      `<polyline points="${line}" fill="none" stroke="#0173b2" stroke-width="1.5" stroke-opacity="0.8"/>${dots.join("")}` +
      `<circle cx="${cx}" cy="${cy}" r="${radius}" fill="#de8f05" fill-opacity="0.25" stroke="#de8f05"/>` +
      `<circle cx="${cx}" cy="${cy}" r="4.5" fill="#de8f05"/>` +
      `<text x="${X(0) + 4}" y="${Y(0) + 4}">target: loss 0</text><text x="10" y="${height - 10}">` +
      `orange: step ${at}, and how unsure the filter is (one sd)</text></svg>`
    );
  }

  function plot(trace, title, series, log) {
    const [width, height, left, bottom] = [wide() ? 720 : 400, 170, 54, 22];
    const values = series.flatMap(({ of }) => trace.map(of)).filter((v) => Number.isFinite(v) && (!log || v > 0));
    const scale = log ? Math.log10 : (v) => v;
    let low = log ? Math.floor(scale(Math.min(...values))) : 0;
    let high = log ? Math.ceil(scale(Math.max(...values))) : 1;
    if (!(high > low)) [low, high] = [low - 1, low + 1];
    const X = (k) => left + ((width - left - 12) * (k - 1)) / (trace.length - 1);
    const Y = (v) => 22 + (height - bottom - 22) * (1 - (Math.max(scale(Math.max(v, 1e-300)), low) - low) / (high - low));
    const marks = [low, (low + high) / 2, high].map((v) => {
      const y = 22 + (height - bottom - 22) * (1 - (v - low) / (high - low));
      const text = log ? shown(10 ** v) : v;
      return `<line x1="${left}" x2="${width - 12}" y1="${y}" y2="${y}" stroke="currentColor" stroke-opacity="0.2"/>` +
        `<text x="${left - 6}" y="${y + 4}" text-anchor="end">${text}</text>`;
    });
    const lines = series.map(({ of, colour, dash }) => {
      const points = trace.map((step) => `${X(step.k).toFixed(1)},${Y(of(step)).toFixed(1)}`).join(" ");
      return `<polyline points="${points}" fill="none" stroke="${colour}" stroke-width="2" stroke-dasharray="${dash || ""}"/>`;
    });
    let x = left + 8 + 7 * title.length;
    const legend = series.map(({ name, colour }) => {
      const text = `<text x="${x}" y="14" style="fill: ${colour}; font-weight: 600">${name}</text>`;
      x += 7.2 * name.length + 18;
      return text;
    });
    return (
      `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${title}">${marks.join("")}${lines.join("")}` +
      `<line x1="${X(at)}" x2="${X(at)}" y1="20" y2="${height - bottom}" stroke="#de8f05"/>` +
      `<text x="${left}" y="14">${title}</text>${legend.join("")}` +
      `<text x="${width - 12}" y="${height - 6}" text-anchor="end">step</text></svg>`
    );
  }

  function draw() {
    const trace = walk(chosen);
    const now = trace[at - 1];
    refreshers.forEach((refresh) => refresh());
    place.querySelector(".valley").innerHTML = valley(trace);
    place.querySelector(".told").textContent =
      `Step ${at}: it sees the loss ${now.e.toPrecision(3)}; predicted variance ${now.predicted.toPrecision(3)}, ` +
      `so S = ${now.S.toPrecision(3)}; it takes away ${(100 * now.gain).toFixed(0)} % of the loss, to first order, ` +
      `and the variance falls to ${now.variance.toPrecision(3)}.`;
    place.querySelector(".plots").innerHTML =
      plot(trace, "loss without noise:", [{ name: "L", of: (step) => step.loss, colour: "#029e73" }], true) +
      plot(trace, "variance:", [
        { name: "predicted", of: (step) => step.predicted, colour: "#de8f05" },
        { name: "after the loss was seen", of: (step) => step.variance, colour: "#0173b2", dash: "5 3" },
      ], true) +
      plot(trace, "share of the loss that a step takes away:", [{ name: "P|g|²/S", of: (step) => step.gain, colour: "#cc78bc" }], false);
  }

  draw();
  addEventListener("resize", draw);
}

if (typeof module !== "undefined") {
  module.exports = { innovationVariance, predictPosition, conditionPosition, predictMomentum, conditionMomentum, walk, START, CURVATURES };
} else {
  explorable(document.getElementById("be-the-filter"));
}
