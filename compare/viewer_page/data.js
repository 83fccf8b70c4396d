// ---------------------------------------------------------------- the episodes
// The index is read at once; chunks of episodes are inflated when one of theirs is looked at.

const FAULT_MODEL = 1, FAULT_INFRASTRUCTURE = 2, FATAL = 4, MASKED = 8, UNREAD = 16;
const KEPT_CHUNKS = 400;

let index, column, firstOfChunk;
const openChunks = new Map();

async function inflate(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate-raw'));
  return JSON.parse(await new Response(stream).text());
}

async function openIndex() {
  index = await inflate('index');
  column = index.columns;
  firstOfChunk = [0];
  for (const n of index.chunks) firstOfChunk.push(firstOfChunk[firstOfChunk.length - 1] + n);
  index.size = column.step.length;
  index.hasPictures = index.pictures.includes(true);
  // episodes of a question lie side by side: evaluations first, by run and step
  index.firstOf = new Int32Array(index.questions.length + 1).fill(-1);
  for (let i = index.size - 1; i >= 0; i--) index.firstOf[column.question[i]] = i;
  index.firstOf[index.questions.length] = index.size;
  for (let q = index.questions.length - 1; q >= 0; q--) {
    if (index.firstOf[q] < 0) index.firstOf[q] = index.firstOf[q + 1];
  }
}

function chunkOf(i) {
  let low = 0, high = index.chunks.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (firstOfChunk[middle] <= i) low = middle; else high = middle - 1;
  }
  return low;
}

function openChunk(number) {
  let chunk = openChunks.get(number);
  if (chunk === undefined) {
    chunk = inflate(`chunk-${number}`);
    openChunks.set(number, chunk);
    if (openChunks.size > KEPT_CHUNKS) openChunks.delete(openChunks.keys().next().value);
  }
  return chunk;
}

// The whole of an episode: what the index says of it, and its texts in their places.
async function episode(i) {
  const number = chunkOf(i);
  const {texts, episodes} = await openChunk(number);
  const body = episodes[i - firstOfChunk[number]];
  const text = (n) => (n === undefined ? null : texts[n]);
  const turns = body.turns.map((turn) => ({
    ...turn,
    text: texts[turn.text],
    observation: text(turn.observation),
    hits: (turn.hits || []).map(text),
    images: turn.images || [],
    calls: turn.calls || [],
  }));
  return {
    number: i,
    prompt: texts[body.prompt],
    images: body.images || [],
    turns,
    answer: text(body.answer),
    answers: (body.answers || []).map(text),
    gold: new Set((body.gold || []).map(text)),
    rewards: body.rewards || [],
    advantages: body.advantages || [],
    maskedFrom: body.masked_from,
    searches: searchesOf(turns),
  };
}

// As `obm follow` has them: queries in order, an image search as its region in brackets.
function searchesOf(turns) {
  const calls = turns.flatMap((turn) => turn.calls);
  return calls.filter((call) => call.type === 'search' || call.type === 'image_search')
    .map((call) => (call.type === 'search' ? String(call.query) : `[${call.region}]`));
}

// Whether each episode of a chunk has the words somewhere in it.
async function matchesIn(number, words) {
  const {texts, episodes} = await openChunk(number);
  const found = texts.map((text) => text.toLowerCase().includes(words));
  return episodes.map((body) => found[body.prompt] || found[body.answer]
    || (body.answers || []).some((n) => found[n])
    || body.turns.some((turn) => found[turn.text] || found[turn.observation]));
}

// ---------------------------------------------------------------- of one question

const runName = (i) => index.runs[column.run[i]].name;
const armOf = (i) => index.arms[index.runs[column.run[i]].arm];
const phaseOf = (i) => (column.is_training[i] ? 'train' : 'eval');
const questionText = (i) => index.questions[column.question[i]].text.replace(/^Question:\s*/, '');
const stopOf = (i) => index.stops[column.stop[i]];
const answerOf = (i) => (column.answer[i] === null ? null : index.answers[column.answer[i]]);

// Episodes of the same question in the same phase, by run and step.
function siblings(i) {
  const q = column.question[i], same = [];
  for (let k = index.firstOf[q]; k < index.firstOf[q + 1]; k++) {
    if (column.is_training[k] === column.is_training[i]) same.push(k);
  }
  return same;
}

function ofRun(i, run) {
  return siblings(i).filter((k) => column.run[k] === run);
}

// The episode of a run whose step is nearest; of several at one step the one at the same place.
function nearest(i, run) {
  const same = ofRun(i, run);
  if (!same.length) return null;
  const far = (k) => Math.abs(column.step[k] - column.step[i]);
  const least = Math.min(...same.map(far));
  const there = same.filter((k) => far(k) === least);
  return there[Math.min(copyOf(i), there.length - 1)];
}

// Which of several episodes of one question, run and step this is, from 0.
function copyOf(i) {
  let n = 0;
  while (i - n > 0 && ['run', 'step', 'question', 'is_training']
    .every((name) => column[name][i - n - 1] === column[name][i])) n++;
  return n;
}

// What is not as it was: `before` and `now` as `episode` returns them.
function changes(before, now) {
  const a = before.number, b = now.number, changed = [];
  if (before.answer !== now.answer) changed.push('answer');
  if (column.reward[a] !== column.reward[b]) changed.push('reward');
  if (before.searches.join('\n') !== now.searches.join('\n')) changed.push('searches');
  if (column.stop[a] !== column.stop[b]) changed.push('stop');
  return changed;
}

function pictureSource(number) {
  if (number < 0 || !index.pictures[number]) return null;
  return `data:image/webp;base64,${document.getElementById(`picture-${number}`).textContent}`;
}
