// Pictures on canvases, with exactly the pixels that the service sent, and differences between two of them.

const EXACT = { colorSpaceConversion: "none", premultiplyAlpha: "none" };

export function pngOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], { type: "image/png" });
}

// Shows the newest picture that was put in; decoding may finish in another order.
export class Picture {
  #newest = 0;

  constructor(width, height, label) {
    this.canvas = document.createElement("canvas");
    Object.assign(this.canvas, { width, height, className: width < 256 ? "picture small" : "picture" });
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", label);
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
  }

  async put(png) {
    const turn = (this.#newest += 1);
    const bitmap = await createImageBitmap(png, EXACT);
    if (turn === this.#newest) this.context.drawImage(bitmap, 0, 0);
    bitmap.close();
  }

  get data() {
    return this.context.getImageData(0, 0, this.canvas.width, this.canvas.height).data;
  }
}

// a, b: values 0..255, four a pixel. Mean and largest absolute difference of the colours.
export function differenceOf(a, b) {
  let sum = 0;
  let most = 0;
  for (let i = 0; i < a.length; i += 1) {
    if (i % 4 === 3) continue; // opacity
    const apart = Math.abs(a[i] - b[i]);
    sum += apart;
    most = Math.max(most, apart);
  }
  return { mean: sum / (0.75 * a.length), most };
}

// A canvas of |a - b|, on which `most` is white.
export function differencePicture(a, b, width, height, most, label) {
  const picture = new Picture(width, height, label);
  const made = picture.context.createImageData(width, height);
  for (let i = 0; i < a.length; i += 1) {
    made.data[i] = i % 4 === 3 ? 255 : (255 * Math.abs(a[i] - b[i])) / (most || 1);
  }
  picture.context.putImageData(made, 0, 0);
  return picture.canvas;
}
